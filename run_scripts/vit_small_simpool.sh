#!/usr/bin/env bash
# ViT-S/16, SimPool (gamma 1.25), 100 epochs.
#   DATA=/path/to/imagenet bash run_scripts/vit_small_simpool.sh
# Published with 8 GPUs x 100 images; hours not published.
# Published on ImageNet-1k, k-NN (k = 10) / linear: 69.7 / 72.8. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
recipe 800 --arch vit_small --mode simpool "$@"
