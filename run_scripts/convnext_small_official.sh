#!/usr/bin/env bash
# ConvNeXt-S, average pooling, 100 epochs.
#   DATA=/path/to/imagenet bash run_scripts/convnext_small_official.sh
# Published with 8 GPUs x 60 images; hours not published.
# Published on ImageNet-1k, k-NN (k = 10) / linear: 59.3 / 63.9. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
recipe 480 --arch convnext_small --mode official "$@"
