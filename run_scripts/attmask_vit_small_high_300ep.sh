#!/usr/bin/env bash
# AttMask-High on ViT-S/16, 300 epochs on ImageNet-1k.
#   DATA=/path/to/imagenet bash run_scripts/attmask_vit_small_high_300ep.sh
# Published with 8 GPUs x 100 images.
# Published k-NN / linear top-1: 75.0 / 77.5. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
program=main_attmask.py
recipe 800 --arch vit_small --recipe attmask300 "$@"
