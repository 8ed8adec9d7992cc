#!/usr/bin/env bash
# ResNet-50 with labels, SimPool (gamma 2.0), 300 epochs.
#   DATA=/path/to/imagenet bash run_scripts/supervised_resnet50_simpool_300ep.sh
# Global batch 1024 as published, for instance 8 GPUs x 128 images in 3 augmentation splits each.
# Published top-1 on ImageNet-1k: 78.7. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
program=main_supervised.py
recipe 1024 --arch resnet50 --mode simpool --epochs 300 "$@"
