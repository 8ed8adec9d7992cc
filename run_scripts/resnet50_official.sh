#!/usr/bin/env bash
# ResNet-50, average pooling, 100 epochs.
#   DATA=/path/to/imagenet bash run_scripts/resnet50_official.sh
# Published with 16 GPUs x 90 images; hours not published.
# Published on ImageNet-1k, k-NN (k = 10) / linear: 61.8 / 63.8. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
recipe 1440 --arch resnet50 --mode official "$@"
