#!/bin/sh
# Bring the virtual environment VENV up to date with requirements/$1.txt, made by PYTHON or by the first Python that is new enough.
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
if [ -n "$PYTHON" ]; then
  if ! command -v "$PYTHON" >/dev/null; then
    echo "PYTHON=$PYTHON is no program: name one with PYTHON=/path/to/python3." >&2
    exit 1
  elif ! "$PYTHON" -c "$new_enough" 2>/dev/null; then
    echo "PYTHON=$PYTHON cannot be used: hello needs Python 3.11 or newer." >&2
    exit 1
  fi
  exec "$PYTHON" tools/environment.py "$VENV" "$1" exactly
fi
for python in python3 python3.14 python3.13 python3.12 python3.11 python "$VENV/bin/python"; do
  "$python" -c "$new_enough" 2>/dev/null && exec "$python" tools/environment.py "$VENV" "$1"
done
echo 'hello needs Python 3.11 or newer on the PATH: install it, or name one with PYTHON=/path/to/python3.' >&2
exit 1
