#!/usr/bin/env bash
# ConvNeXt-S with labels, SimPool (gamma 2.0), 100 epochs.
#   DATA=/path/to/imagenet bash run_scripts/supervised_convnext_small_simpool.sh
# Global batch 1024 as published, for instance 8 GPUs x 128 images.
# Published top-1 on ImageNet-1k: 81.7. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
program=main_supervised.py
recipe 1024 --arch convnext_small --mode simpool "$@"
