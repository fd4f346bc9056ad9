#!/bin/sh
# Pin the newest dependencies of pyproject.toml, with hashes, in requirements/: `make lock`.
set -eu
compile() {
  "$VENV/bin/uv" pip compile --quiet --upgrade --universal --python-version 3.11 \
    --generate-hashes --no-header --no-annotate "$@"
}

# Pin what a group needs beside the packages that another file pins for all systems, which its own file includes.
compile_more() {
  group=$1 included=$2
  pinned=$(sed -n 's/^\([^ =]*\)==[^ ]* \\$/--no-emit-package \1/p' requirements/service.txt "requirements/$included.txt")
  # shellcheck disable=SC2086 # it is several arguments
  more=$(compile pyproject.toml --group "$group" $pinned \
    --constraint requirements/service.txt --constraint "requirements/$included.txt")
  printf -- '-r %s.txt\n%s\n' "$included" "$more" >"requirements/$group.txt"
}

compile pyproject.toml --output-file requirements/service.txt >/dev/null
compile_more run service
compile_more dev run
compile_more bench run
compile --group docs --output-file requirements/docs.txt >/dev/null
