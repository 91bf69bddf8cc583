# Sourced by the other scripts: makes .venv with the tested versions if there is none (or if they have changed), and
# uses it. PYTHON=... chooses the interpreter (3.11 or later).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp="$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)"
if [[ "$(cat .venv/align-stamp 2>/dev/null)" != "$stamp" ]]; then
    echo "installing into .venv (once) ..."
    "${PYTHON:-python3}" -c 'import sys; sys.exit("align needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
    "${PYTHON:-python3}" -m venv .venv
    # by uv, in a fraction of pip's time; torch is left to pip and its settings, which may know of a build for the CPU
    .venv/bin/python -m pip install -q --no-compile -c constraints.txt "uv>=0.13" torch
    .venv/bin/uv pip install -q --python .venv/bin/python -c constraints.txt -e ".[dev]" \
        || .venv/bin/python -m pip install -q --no-compile -c constraints.txt -e ".[dev]"
    echo "$stamp" > .venv/align-stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE # each of hundreds of processes would compile the same files
