#!/usr/bin/env bash
# AttMask-High on ViT-S/16, 100 epochs on ImageNet-1k.
#   DATA=/path/to/imagenet bash run_scripts/attmask_vit_small_high.sh
# Published with 4 GPUs x 60 images.
# Published k-NN / linear top-1: 72.5 / 75.7. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
program=main_attmask.py
recipe 240 --arch vit_small --recipe attmask --pred_shape attmask_high "$@"
