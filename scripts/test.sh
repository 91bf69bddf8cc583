#!/usr/bin/env bash
# Style, types and tests. bash scripts/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
ruff format --check .
mypy
OMP_NUM_THREADS=1 exec python -m pytest -n 2 --dist worksteal "$@"
