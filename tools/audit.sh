#!/bin/sh
# Check the pinned dependencies for known vulnerabilities: `make audit`.
if "$VENV/bin/python" -c 'from urllib.request import urlopen; urlopen("https://pypi.org/pypi/pip/json", timeout=5)' 2>/dev/null; then
  "$VENV/bin/uv" tool run --quiet pip-audit@2.10.1 --disable-pip --require-hashes -r requirements/dev.txt
else
  echo 'pypi.org cannot be reached: nothing was checked.' >&2
  exit 1
fi
