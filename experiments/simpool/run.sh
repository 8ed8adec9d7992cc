#!/usr/bin/env bash
# SimPool against the architecture's own pooling, trained with DINO: a small ViT and a ResNet-18.
#   bash experiments/simpool/run.sh --data_path cifar10/ --epochs 20
#   bash experiments/simpool/run.sh --data_path demo --epochs 12 --only vit_official vit_simpool
# experiments/grid.sh lists the flags: --seeds, --only, --output_dir; all others go to the program.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../grid.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../small.sh"
program=(main_dino.py)
settle "$@"
for mode in official simpool; do
    variant "vit_$mode" "${vit[@]}" --mode "$mode"
    variant "resnet_$mode" "${resnet[@]}" --mode "$mode"
done
finish
