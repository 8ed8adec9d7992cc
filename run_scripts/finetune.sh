#!/usr/bin/env bash
# Fine-tuning of a pretrained backbone, AttMask's transfer: DeiT's recipe, 500 epochs (CIFAR; 1,000 on Flowers).
#   DATA=/path/to/images CHECKPOINT=/path/to/checkpoint.pth bash run_scripts/finetune.sh
# Global batch 900, for instance 9 forwards of 100 images. From the environment, besides recipe.sh's: CHECKPOINT, and
# KEY=teacher (default) or student, the backbone that is taken from it.
set -euo pipefail
if [ -z "${CHECKPOINT:-}" ]; then
    echo "set CHECKPOINT to the pretrained model, for instance: CHECKPOINT=output/run/checkpoint.pth bash $0" >&2
    exit 2
fi
CHECKPOINT=$(realpath "$CHECKPOINT")
source "$(dirname "$0")/recipe.sh"
program=main_supervised.py
recipe 900 --recipe finetune --init_from "$CHECKPOINT" --checkpoint_key "${KEY:-teacher}" "$@"
