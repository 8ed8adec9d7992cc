#!/usr/bin/env bash
# ViT-S/16, SimPool (gamma 1.25), 100 epochs on ImageNet-20% (the first 260 images of each class).
#   DATA=/path/to/imagenet bash run_scripts/vit_small_simpool_imagenet20.sh
# Published with 8 GPUs x 100 images; hours not published.
# Published on ImageNet-1k, k-NN (k = 10) / linear: no figure for this subset in the table that the README cites. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
recipe 800 --arch vit_small --mode simpool --subset 260 "$@"
