# Sourced by the other scripts: makes .venv with the tested versions if there is none (or if they have changed), and
# uses it. PYTHON=... chooses the interpreter (3.11 or later).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp="$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)"
if [[ "$(cat .venv/align-stamp 2>/dev/null)" != "$stamp" ]]; then
    echo "installing into .venv (once) ..."
    "${PYTHON:-python3}" -c 'import sys; sys.exit("align needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
    "${PYTHON:-python3}" -m venv .venv
    # compiled on all cores, where pip takes one; some files are of other Pythons, and fail
    .venv/bin/python -m pip install -q --no-compile -c constraints.txt -e ".[dev]"
    .venv/bin/python -m compileall -q -j 0 .venv/lib > /dev/null 2>&1 || true
    echo "$stamp" > .venv/align-stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
