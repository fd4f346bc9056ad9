#!/bin/sh
# Pin the newest dependencies of pyproject.toml, with hashes, in requirements/: `make lock`.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp pyproject.toml "$folder"
"$VENV/bin/uv" lock --quiet --project "$folder"

# Print the pins of one group, or with --no-default-groups of the service. sed removes the condition that the system is one
# of `environments`: on another one pip must fail, not install nothing.
export_group() {
  "$VENV/bin/uv" export --quiet --project "$folder" --frozen --no-emit-project --no-header --no-annotate "$@" |
    sed -E 's/ (;|and) \(+platform_machine.*\\$/ \\/'
}

# Write the pins of a group and, before them, the name of the file that its own file includes.
export_more() {
  printf -- '-r %s.txt\n%s\n' "$2" "$(export_group --only-group "$1")" >"requirements/$1.txt"
}

export_group --no-default-groups >requirements/service.txt
export_more run service
export_more dev run
export_more bench run
