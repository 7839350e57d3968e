#!/usr/bin/env bash
# The tests, from a bare clone: bash scripts/test.sh [pytest arguments]. Minutes-long ones: bash scripts/test.sh -m heavy
set -u
. "$(dirname "$0")/setup.sh"
cd "${at:-.}" || exit 1
[ $# -gt 0 ] || set -- -n 2  # most tests wait for processes that start: two at a time take little more than one
echo "2. tests: pytest $*"
exec .venv/bin/python -m pytest -q --durations=8 "$@"
