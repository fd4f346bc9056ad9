#!/bin/sh
# Install wrk, the client of `make bench`, if it is missing.
command -v wrk >/dev/null && exit
echo 'wrk is missing: trying apt-get install wrk ...'
{ apt-get update && apt-get install -y wrk; } >/dev/null 2>&1 && exit
echo 'make bench needs wrk: install it (Debian: apt-get install wrk).' >&2
exit 1
