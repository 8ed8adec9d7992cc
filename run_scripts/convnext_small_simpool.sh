#!/usr/bin/env bash
# ConvNeXt-S, SimPool (gamma 2), 100 epochs.
#   DATA=/path/to/imagenet bash run_scripts/convnext_small_simpool.sh
# Published with 8 GPUs x 60 images; hours not published.
# Published on ImageNet-1k, k-NN (k = 10) / linear: 68.7 / 72.2. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
recipe 480 --arch convnext_small --mode simpool "$@"
