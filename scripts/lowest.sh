#!/usr/bin/env bash
# The quick part of the tests with the lowest versions that pyproject.toml admits, in an environment of its own. When it
# passes, scripts/lowest.txt tells with which; tests/test_install.py holds the bounds to it.
#   bash scripts/lowest.sh [torch==VERSION]    # a torch other than the lowest is a trial, which writes nothing
# ALIGN_LOWEST_VENV=DIR keeps the environment, PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${ALIGN_LOWEST_VENV:-$(mktemp -d)}"
[[ -n "${ALIGN_LOWEST_VENV:-}" ]] || trap 'rm -rf "$venv"' EXIT
[[ -x "$venv/bin/python" ]] || "${PYTHON:-python3}" -m venv "$venv"
export UV_LINK_MODE=copy PATH="$venv/bin:$PATH"

# torch is left to pip and its settings, which may know of a build for the CPU alone
python -m pip install -q "uv>=0.13" "${1:-$(sed -nE 's/^ *"torch>=(.*)",/torch==\1/p' pyproject.toml)}"
echo torch > "$venv/excluded.txt"
uv pip compile -q --python "$venv" --resolution lowest-direct --excludes "$venv/excluded.txt" --extra dev \
    -o "$venv/lowest.txt" pyproject.toml
uv pip install -q --python "$venv" --no-deps -r "$venv/lowest.txt"
python -m pip install -q --no-deps --no-build-isolation .
python -m pip check

ruff check --no-cache .
mypy --cache-dir "$venv/mypy"
OMP_NUM_THREADS=1 python -m pytest -n 2 -p no:cacheprovider \
    tests/test_house.py tests/test_docs.py tests/data tests/test_stages.py tests/test_quantised.py tests/test_store.py \
    tests/test_page.py tests/test_browser.py tests/test_ppo.py::test_a_run_logs_everything_and_starts_at_ratio_one \
    tests/test_ppo.py::test_trl_rewards_run_unchanged_beside_others \
    tests/test_methods.py::test_every_other_peft_type_that_is_named "tests/test_methods.py::test_optimisers_of_bitsandbytes[adamw_8bit-sft]"

[[ $# == 0 ]] || exit 0
{
    echo "# What scripts/lowest.sh last passed with, on $(python -V)"
    uv pip freeze --python "$venv" | grep -v "^align-rlhf"
} > scripts/lowest.txt
