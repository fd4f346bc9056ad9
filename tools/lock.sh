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
  "$VENV/bin/uv" export --quiet --project "$folder" --frozen --no-emit-project --no-header --no-annotate \
    --output-file "$folder/pins.txt" "$@" >/dev/null
  sed -E 's/ (;|and) \(+platform_machine.*\\$/ \\/' "$folder/pins.txt"
}

# Write the pins of a group and, before them, the name of the file that its own file includes.
export_more() {
  pins=$(export_group --only-group "$1")
  printf -- '-r %s.txt\n%s\n' "$2" "$pins" >"requirements/$1.txt"
}

pins=$(export_group --no-default-groups)
echo "$pins" >requirements/service.txt
export_more run service
export_more dev run
export_more bench run
