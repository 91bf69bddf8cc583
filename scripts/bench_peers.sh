#!/usr/bin/env bash
# Makes the environments of the systems that scripts/bench.py compares with, in $ALIGN_PEERS (or the user's cache):
# TRL 1.12.0 for PPO, the last release that has it, and TRL 1.16.0 for all else. All other versions are those of
# constraints.txt, so that both sides run on the same torch and transformers.
# bash scripts/bench_peers.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
peers="${ALIGN_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/align-peers}"
mkdir -p "$peers"
grep -v '^trl==' constraints.txt > "$peers/constraints.txt"
for version in 1.12.0 1.16.0; do
    folder="$peers/trl-$version"
    if [[ -f "$folder/ready" ]]; then
        echo "$folder is there already"
        continue
    fi
    echo "installing TRL $version into $folder ..."
    "${PYTHON:-python3}" -m venv "$folder"
    "$folder/bin/python" -m pip install -q "$(grep '^torch==' constraints.txt)"  # first, so that no other build is pulled
    "$folder/bin/python" -m pip install -q -c "$peers/constraints.txt" "trl==$version" peft accelerate
    touch "$folder/ready"
done
echo "scripts/bench.py --peer trl finds them through ALIGN_PEERS=$peers"
