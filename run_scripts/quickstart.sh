#!/usr/bin/env bash
# See it work: install, pretrain a small SimPool ViT on real image patches, evaluate it before and after.
#   bash run_scripts/quickstart.sh [OUTPUT_DIR]        about 8 minutes on 2 cores, the install included
#   SEED=1 bash run_scripts/quickstart.sh              another seed
# The images are the built-in set: patches of the photographs that come inside scikit-image and scikit-learn.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
use_environment
output=${1:-output/quickstart}
seed=${SEED:-0}

model=(--arch vit_small --mode simpool --patch_size 4 --embed_dim 96 --depth 4 --num_heads 3 --img_size 32)
evaluation=(--data_path demo --batch_size_per_gpu 250 --num_workers 0)
linear=("${evaluation[@]}" --epochs 10 --lr 0.03 0.1 0.3 1)

echo "== 1/4 before training: k-NN and linear probe of the untrained backbone"
"$PYTHON" eval_knn.py "${model[@]}" "${evaluation[@]}" --nb_knn 20 --seed "$seed" --output_dir "$output/before"
"$PYTHON" eval_linear.py "${model[@]}" "${linear[@]}" --seed "$seed" --output_dir "$output/before"

echo "== 2/4 pretraining"
"$PYTHON" main_dino.py "${model[@]}" --data_path demo --output_dir "$output" --seed "$seed" \
    --epochs 8 --batch_size_per_gpu 64 --lr 0.001 --min_lr 1e-5 --warmup_epochs 1 --warmup_teacher_temp_epochs 2 \
    --momentum_teacher 0.98 --out_dim 1024 --local_crops_number 4 --drop_path_rate 0 \
    --num_workers 0 --eval_every 4 --nb_knn 20

echo "== 3/4 after training: k-NN and linear probe"
"$PYTHON" eval_knn.py --pretrained_weights "$output/checkpoint.pth" "${evaluation[@]}" --nb_knn 20 --output_dir "$output/after"
"$PYTHON" eval_linear.py --pretrained_weights "$output/checkpoint.pth" "${linear[@]}" --seed "$seed" --output_dir "$output/after"

echo "== 4/4 attention maps of validation images"
"$PYTHON" visualize_attention.py --pretrained_weights "$output/checkpoint.pth" --data_path demo:48 --num_images 8 \
    --image_size 192 --output_dir "$output/attention"

"$PYTHON" - "$output" <<'PY'
import json
import sys
from pathlib import Path

output = Path(sys.argv[1])

def result(when, program):
    return json.loads((output / when / f"{program}.json").read_text())["results"]

print(json.dumps(result("before", "eval_knn"))[:300], json.dumps(result("before", "eval_linear"))[:600])
PY
