#!/usr/bin/env bash
# ViT-S/16 with labels, the architecture's own pooling, 100 epochs.
#   DATA=/path/to/imagenet bash run_scripts/supervised_vit_small_official.sh
# Global batch 592 as published, for instance 8 GPUs x 74 images.
# Published top-1 on ImageNet-1k: 72.7. Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
program=main_supervised.py
recipe 592 --arch vit_small --mode official "$@"
