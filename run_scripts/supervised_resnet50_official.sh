#!/usr/bin/env bash
# ResNet-50 with labels, the architecture's own pooling, 100 epochs.
#   DATA=/path/to/imagenet bash run_scripts/supervised_resnet50_official.sh
# Global batch 1024 as published, for instance 8 GPUs x 128 images in 3 augmentation splits each.
# Published top-1 on ImageNet-1k: 77.4. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
program=main_supervised.py
recipe 1024 --arch resnet50 --mode official "$@"
