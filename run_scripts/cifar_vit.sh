#!/usr/bin/env bash
# ViT-T with patches of 4 on CIFAR-10 or other images of 32 pixels: two crops, no blur, 200 epochs.
#   DATA=/path/to/cifar10 bash run_scripts/cifar_vit.sh
# Views and head follow lightly's CIFAR-10 benchmark, the optimizer the demo's recipe; there is no published run of it.
# docs/LOG.md tells what was tried here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
recipe 128 --recipe cifar --arch vit_tiny --mode simpool "$@"
