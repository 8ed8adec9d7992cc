#!/usr/bin/env bash
# Ours against the published algorithm: the same settings and images, once with main_dino.py and once with every formula
# written out plainly and the augmentation of Pillow and torchvision (plain.py).
#   bash experiments/published/run.sh --data_path cifar10/ --epochs 20          a folder: the plain side opens files
# experiments/grid.sh lists the flags: --seeds, --only, --output_dir; all others go to the program.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../grid.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../small.sh"
settle "$@"
for side in ours plain; do
    program=(main_dino.py)
    [ "$side" = ours ] || program=(-m experiments.published.plain)
    variant "vit_$side" "${vit[@]}" --mode official --drop_path_rate 0
    variant "resnet_$side" "${resnet[@]}" --mode official
done
finish
