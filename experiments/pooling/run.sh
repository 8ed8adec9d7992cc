#!/usr/bin/env bash
# Which pooling: a supervised network with the architecture's own pooling and with each operator, nothing else changed.
#   bash experiments/pooling/run.sh --data_path /path/to/imagenet --subset 260 --epochs 100
#   bash experiments/pooling/run.sh --data_path demo --arch vit_tiny --img_size 32 --patch_size 8 --epochs 20
# experiments/grid.sh lists the flags: --seeds, --only, --output_dir; all others go to main_supervised.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../grid.sh"
settle "$@"
for mode in $("$PYTHON" -c 'from pooled_backbone import MODES; print(*MODES)'); do
    variant "$mode" --arch resnet18 --mode "$mode"
done
finish
