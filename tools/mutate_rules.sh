#!/bin/sh
# Count which of mutmut's hundreds of small changes to hello.py and the parser the tests notice: about four minutes.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/hello"
cp -R .env.example hello.py test_hello.py conftest.py gunicorn.conf.py openapi.yaml schema.sql pyproject.toml server tools tests \
  "$folder/hello"
cat >>"$folder/hello/pyproject.toml" <<'END'

[tool.mutmut]
source_paths = ["hello.py", "server/parser.py"]
also_copy = [".env.example", "conftest.py", "test_hello.py", "server", "tools", "tests", "openapi.yaml", "schema.sql",
  "gunicorn.conf.py"]
pytest_add_cli_args_test_selection = ["test_hello.py", "tests/test_parser.py"]
END
mutmut="$(cd "$(dirname "$VENV/bin/uv")" && pwd)/uv tool run --quiet --with-requirements $PWD/requirements/dev.txt mutmut@3.8.1"
cd "$folder/hello"
$mutmut run 'hello.x_birthday_in*' 'hello.x_days_until_birthday*' 'hello.x_parse_*' 'hello.x_read_content*' \
  'server.parser.*' >mutmut.log 2>&1 || tail -n 20 mutmut.log
$mutmut export-cicd-stats >/dev/null
cat mutants/mutmut-cicd-stats.json
$mutmut results | grep -v 'not checked' || true
