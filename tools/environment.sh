#!/bin/sh
# Bring the virtual environment VENV up to date with requirements/$1.txt: `make run-environment`.
# In it, `.made-by-make` says that make may empty it, and `installed-NAME.txt` has all files of requirements/ as they
# were then.
set -eu
mark=$VENV/.made-by-make
requirements=requirements/$1.txt
installed=$VENV/installed-$1.txt
print_version='import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit(1); print(*sys.version_info[:2], sep=".")'

fail() {
  echo "$1" >&2
  exit 1
}

# Set `python` to PYTHON or to the first Python that is new enough, and `wanted` to its version.
find_python() {
  set -- python3 python3.14 python3.13 python3.12 python3.11 python
  # Distributions optimise their Python with a profile, as Docker's images do. pyenv does not, and hello is slower with it.
  if [ "$requirements" = requirements/bench.txt ] && /usr/bin/python3 -c 'import ensurepip' 2>/dev/null; then
    set -- /usr/bin/python3 "$@"
  fi
  [ -z "$PYTHON" ] || set -- "$PYTHON"
  for python; do
    if wanted=$("$python" -c "$print_version" 2>/dev/null); then return; fi
  done
  fail "hello needs Python 3.11 to 3.14, and none of these is: $*. Name one: \`make run PYTHON=/path/to/python3\`."
}

mkdir -p "$VENV" 2>/dev/null ||
  fail "$VENV cannot be made: name other folders, as in \`make run VENV=\"\$HOME/venv\" DATA=\"\$HOME/data\"\`."

# Not two installations at once. pip inherits the lock and holds it even if this shell is killed.
exec 9<"$VENV"
if ! flock --nonblock 9; then
  echo "Waiting for another \`make\` that installs into $VENV ..."
  flock 9 || true # NFS cannot lock a folder
fi

present=$("$VENV/bin/python" -c "import pip; $print_version" 2>/dev/null) || present=
if [ -e "$mark" ] && ! ls "$VENV"/installed-*.txt >/dev/null 2>&1; then
  present= # an installation was interrupted
fi
wanted=$present
if [ -z "$present" ] || [ -n "$PYTHON" ]; then find_python; fi

if [ "$present" != "$wanted" ]; then
  [ -e "$mark" ] || [ -z "$(ls -A "$VENV")" ] ||
    fail "$VENV has no Python $wanted with pip, and make did not make it: name another, as in \`make run VENV=.venv2\`."
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail 'This Python has no venv module: install it (on Debian: apt-get install python3-venv).'
  echo "Creating the virtual environment $VENV ..."
  touch "$mark"
  find "$VENV" -mindepth 1 -maxdepth 1 ! -name .made-by-make -exec rm -rf {} +
  "$python" -m venv "$VENV"
elif cat requirements/*.txt | cmp -s - "$installed"; then
  exit
fi
echo "Installing $requirements into $VENV; the first time, this downloads packages ..."
rm -f "$VENV"/installed-*.txt
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$requirements"
cat requirements/*.txt >"$installed"
if [ "$1" = dev ]; then cp "$installed" "$VENV/installed-run.txt"; fi
