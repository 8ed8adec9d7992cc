#!/usr/bin/env bash
# AttMask-Hint on ViT-S/16, 100 epochs on ImageNet-20% (the first 260 images of each class).
#   DATA=/path/to/imagenet bash run_scripts/attmask_vit_small_imagenet20.sh
# Published with 4 GPUs x 60 images.
# Published k-NN / linear top-1: 49.5 (k = 20) / 57.5, trained on this subset. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
program=main_attmask.py
recipe 240 --arch vit_small --recipe attmask20 "$@"
