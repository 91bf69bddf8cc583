#!/usr/bin/env bash
# The main job on the embedded tiny model: SFT -> reward model -> PPO -> a judge's table. Offline, on a CPU.
# bash scripts/quickstart.sh [a.b=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec align run quickstart "$@"
