#!/usr/bin/env bash
# ViT-S/16, official [CLS], 100 epochs.
#   DATA=/path/to/imagenet bash run_scripts/vit_small_official.sh
# Published with 8 GPUs x 100 images; hours not published.
# Published on ImageNet-1k, k-NN (k = 10) / linear: 68.9 / 71.5. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
recipe 800 --arch vit_small --mode official "$@"
