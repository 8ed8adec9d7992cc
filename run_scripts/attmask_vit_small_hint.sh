#!/usr/bin/env bash
# AttMask-Hint on ViT-S/16, 100 epochs on ImageNet-1k.
#   DATA=/path/to/imagenet bash run_scripts/attmask_vit_small_hint.sh
# Published with 4 GPUs x 60 images.
# Published k-NN / linear top-1: 72.8 / 76.1. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
program=main_attmask.py
recipe 240 --arch vit_small --recipe attmask "$@"
