#!/usr/bin/env bash
# What a CUDA machine shows, in one command: bash scripts/gpu.sh [OUT]   (OUT: runs/gpu)
#
#   tests         those marked `gpu`
#   rates         what the card multiplies and copies, the ceilings of what follows
#   trace         a token's step and a training pass of the 8B shape, operation by operation
#   1b, 8b, nf4   PPO iterations over random weights of Llama 3's shapes, by phase; nf4 is the 8B shape in 4 bits, by a
#                 process that may have 16 GiB of the card; 1b has a reward model over its base
#   sft, reward   four steps each over the 8B shape in bfloat16
#   trl-ppo, trl-sft, trl-reward   what 1b, sft and reward did, by TRL 1.12 and 1.16
#   quickstart    the README's, with `launch: gpu`
#
# Each part writes to OUT as soon as it has something to say and has a time limit of its own, so that a run that is cut
# off still tells what it found. PARTS="rates 8b" names some. SMALL=1 tries the script itself, on a CPU too.
# PYTHON is an interpreter that has align's packages; where the machine has only some of them and no network, the wheels
# of the others in WHEELS (a folder, .whl) are put beside, in a folder that goes away with the machine; TRL 1.12's in
# WHEELS/peers, which trl-ppo alone sees.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} wheels=${WHEELS:-.whl} parts=${PARTS:-tests rates trace 8b nf4 1b trl-ppo sft trl-sft reward trl-reward quickstart}
mkdir -p "${1:-runs/gpu}"
out=$(cd "${1:-runs/gpu}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if compgen -G "$wheels/*.whl" > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$work/site" "$wheels"/*.whl
fi
if compgen -G "$wheels/peers/*.whl" > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/peers" "$wheels"/peers/*.whl
fi
export PYTHONPATH="$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=disabled
tell() { echo "[$(date +%T)] $*" | tee -a "$out/summary.txt"; }
gpu_work() {
    timeout "$1" "$python" scripts/gpu_work.py --work "$work" --out "$out" ${SMALL:+--small} "${@:2}" 2>> "$out/log.txt"
    [[ $? == 124 ]] && echo "over its $1 s"
}

{ nvidia-smi || true; "$python" --version; "$python" -m pip list; } > "$out/machine.txt" 2>&1
for part in $parts; do
    case $part in
        tests) said=$(timeout 180 "$python" -m pytest -m gpu -p no:cacheprovider tests/test_gpu.py 2>&1 | tee "$out/tests.txt" | tail -1) ;;
        rates) said=$(gpu_work 40 rates) ;;
        quickstart)
            launch=gpu; [[ -n ${SMALL:-} ]] && launch=cpu
            timeout 200 "$python" -m align.cli run quickstart launch=$launch output="$work/quickstart" \
                ${SMALL:+stages.sft.train.max_steps=2 stages.reward.train.max_steps=2 stages.ppo.ppo.num_iterations=1 stages.evaluate.max_prompts=8} \
                > "$out/quickstart.txt" 2>&1
            said="exit code $?, in $SECONDS s from the start"
            cp "$work"/quickstart/ppo/metrics.jsonl "$out/quickstart-ppo.jsonl" 2> /dev/null ;;
        trace) said=$(gpu_work 150 trace 8b --tokens 256 64) ;;
        1b) said=$(gpu_work 120 ppo 1b --prompts 64 --tokens 256 256 --learned) ;;
        trl-ppo) said=$(PYTHONPATH="$work/peers:$PYTHONPATH" gpu_work 150 trl-ppo 1b --prompts 64 --tokens 256 256) ;;
        trl-sft | trl-reward) said=$(gpu_work 120 "$part" 8b --prompts 64 --tokens 256 256) ;;
        8b) said=$(gpu_work 240 ppo 8b --prompts 64 --tokens 256 256) ;;
        nf4) said=$(gpu_work 240 ppo 8b --load-in nf4 --prompts 8 --tokens 512 512 --iterations 1 --memory 16 --gradient-checkpointing) ;;
        sft | reward) said=$(gpu_work 120 "$part" 8b --prompts 64 --tokens 256 256 --gradient-checkpointing) ;;
        *) echo "no part is called $part: tests, rates, trace, 8b, nf4, 1b, sft, reward, trl-ppo, trl-sft, trl-reward, quickstart" >&2; exit 2 ;;
    esac
    tell "$part: $said"
done
