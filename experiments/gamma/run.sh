#!/usr/bin/env bash
# SimPool's exponent: none (a weighted mean of the features) and a range around the published 1.25 and 2.0.
#   bash experiments/gamma/run.sh --data_path /path/to/imagenet --epochs 100                          ViT-S
#   bash experiments/gamma/run.sh --data_path /path/to/imagenet --epochs 100 --arch resnet18          a network of maps
# experiments/grid.sh lists the flags: --seeds, --only, --output_dir; all others go to main_supervised.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../grid.sh"
settle "$@"
variant gamma_none --arch vit_small --mode simpool --gamma None
for gamma in 0.5 1 1.25 1.5 2 3 5; do
    variant "gamma_$gamma" --arch vit_small --mode simpool --gamma "$gamma"
done
finish
