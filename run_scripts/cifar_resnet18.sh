#!/usr/bin/env bash
# ResNet-18 with a small stem on CIFAR-10: two crops of 32 pixels, no blur, 200 epochs.
#   DATA=/path/to/cifar10 bash run_scripts/cifar_resnet18.sh
# lightly's CIFAR-10 benchmark, 1 GPU x 128 images; hours not published.
# Published there on CIFAR-10: 84.0 % k-NN. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
recipe 128 --recipe cifar --arch resnet18 --mode official "$@"
