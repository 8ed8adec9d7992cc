#!/usr/bin/env bash
# Half precision against single: the same runs in float32 and with autocast to bfloat16.
#   bash experiments/precision/run.sh --data_path cifar10/ --epochs 20
# experiments/grid.sh lists the flags: --seeds, --only, --output_dir; all others go to the program.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../grid.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../small.sh"
program=(main_dino.py)
settle "$@"
for amp in none bf16; do
    variant "vit_$amp" "${vit[@]}" --mode simpool --amp "$amp"
    variant "resnet_$amp" "${resnet[@]}" --mode simpool --amp "$amp"
done
finish
