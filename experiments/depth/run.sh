#!/usr/bin/env bash
# How many blocks SimPool is worth: [CLS] with more blocks, SimPool with fewer, and the mean of the tokens.
#   bash experiments/depth/run.sh --data_path /path/to/imagenet --epochs 100
#   BLOCKS=4 bash experiments/depth/run.sh --data_path demo --embed_dim 96 --num_heads 3 --img_size 32 --patch_size 8
# BLOCKS is the depth that the variants start from (12, ViT-S's). experiments/grid.sh lists the flags: --seeds, --only,
# --output_dir; all others go to main_supervised.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../grid.sh"
blocks=${BLOCKS:-12}
settle "$@"
variant gap --arch vit_small --depth "$blocks" --mode gap
variant cls --arch vit_small --depth "$blocks" --mode official
for n in 1 2 3 4 5; do
    variant "cls_more_$n" --arch vit_small --depth "$((blocks + n))" --mode official
done
variant simpool --arch vit_small --depth "$blocks" --mode simpool
for n in 1 2 3; do
    variant "simpool_fewer_$n" --arch vit_small --depth "$blocks" --mode simpool --pool_depth "$n"
done
finish
