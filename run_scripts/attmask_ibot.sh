#!/usr/bin/env bash
# iBOT's block-wise masks on ViT-S/16, 100 epochs on ImageNet-1k: what AttMask is compared with.
#   DATA=/path/to/imagenet bash run_scripts/attmask_ibot.sh
# Published with 4 GPUs x 60 images.
# Published k-NN / linear top-1: 71.5 / 74.4. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
program=main_attmask.py
recipe 240 --arch vit_small --recipe ibot "$@"
