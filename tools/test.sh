#!/bin/sh
# Run the tests: JOBS files at a time, then those marked `serial`; with COVERAGE=yes print what they did not reach.
tests="$VENV/bin/python -m pytest -rs"
if [ "$COVERAGE" = yes ]; then
  rm -f .coverage .coverage.*
  tests="$VENV/bin/coverage run -m pytest -rs"
fi
$tests -n "$JOBS" --dist loadfile --no-loadscope-reorder -m 'not serial' "$@"
parallel=$?
if [ $parallel = 2 ]; then exit 2; fi # interrupted
# Without files in the arguments, only those that have such tests are imported.
$tests -m serial -o testpaths="$(grep -rl '^@pytest.mark.serial' tests)" "$@"
serial=$?
if [ "$COVERAGE" = yes ]; then
  "$VENV/bin/coverage" combine --quiet && "$VENV/bin/coverage" report
fi
# 5: no test was selected, as with `make test ARGS='-k birthday'`
if [ $serial = 5 ]; then serial=$parallel; fi
if [ $parallel = 5 ]; then parallel=$serial; fi
exit $((parallel | serial))
