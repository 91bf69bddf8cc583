#!/usr/bin/env bash
# Style, types and tests. bash scripts/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
ruff format --check .
types="$(mktemp)" # beside the tests: mypy works on one core
mypy > "$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2> /dev/null || true; rm -f "$types"' EXIT # what a trap ends with is the exit code
tests=0
# three on two cores: a test in ten waits, for a signal or a browser, and leaves its core free
OMP_NUM_THREADS=1 python -m pytest -n 3 --dist worksteal "$@" || tests=$?
wait "$checking" || tests=$?
cat "$types"
exit "$tests"
