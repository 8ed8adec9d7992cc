#!/usr/bin/env bash
# ResNet-50, SimPool without gamma, 100 epochs.
#   DATA=/path/to/imagenet bash run_scripts/resnet50_simpool_no_gamma.sh
# Published with 16 GPUs x 90 images; hours not published.
# Published on ImageNet-1k, k-NN (k = 10) / linear: 63.7 / 64.2. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
recipe 1440 --arch resnet50 --mode simpool --gamma None "$@"
