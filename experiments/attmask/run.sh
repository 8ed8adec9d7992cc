#!/usr/bin/env bash
# Which patches to hide: AttMask's High, Hint and Low, random ones and blocks, with everything else unchanged.
#   bash experiments/attmask/run.sh --data_path cifar10/ --epochs 20
#   bash experiments/attmask/run.sh --data_path cifar10/ --epochs 20 --mode simpool          the map is SimPool's
# experiments/grid.sh lists the flags: --seeds, --only, --output_dir; all others go to the program.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../grid.sh"
program=(main_attmask.py)
measure() {
    "${launch[@]}" eval_knn.py --pretrained_weights "$1/checkpoint.pth" --data_path "$data" "${subset[@]}" \
        --output_dir "$1" --low_shot 1 5 10 20 --low_shot_draw random
}
settle "$@"
for shape in attmask_high attmask_hint attmask_low rand block; do
    variant "$shape" --arch vit_small --patch_size 4 --embed_dim 128 --depth 6 --num_heads 4 --img_size 32 \
        --recipe demo --pred_shape "$shape"
done
finish
