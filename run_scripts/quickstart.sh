#!/usr/bin/env bash
# See it work: install, pretrain a small SimPool ViT on real image patches, evaluate it before and after.
#   bash run_scripts/quickstart.sh [OUTPUT_DIR]        about 6 minutes on 2 cores, the install included
#   SEED=1 bash run_scripts/quickstart.sh              another seed
# The images are the built-in set: patches of the photographs that come inside scikit-image and scikit-learn.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
use_environment
output=${1:-output/quickstart}
seed=${SEED:-0}

# The model that --data_path demo trains (training/recipes.py; docs/LOG.md describes how its recipe was found).
model=(--arch vit_small --mode simpool --patch_size 8 --embed_dim 96 --depth 4 --num_heads 3 --img_size 32)
evaluation=(--data_path demo --batch_size_per_gpu 250 --num_workers 0)
linear=("${evaluation[@]}" --epochs 10)

evaluate() { # where, model flags
    local where=$1
    shift
    "$PYTHON" eval_knn.py "$@" "${evaluation[@]}" --nb_knn 20 --seed "$seed" --output_dir "$where"
    "$PYTHON" eval_linear.py "$@" "${linear[@]}" --seed "$seed" --output_dir "$where"
}

echo "== 1/4 before training: k-NN and linear probe of the untrained backbone"
evaluate "$output/before" "${model[@]}"

echo "== 2/4 pretraining, without labels"
"$PYTHON" main_dino.py --data_path demo --output_dir "$output" --seed "$seed"

echo "== 3/4 after training: k-NN and linear probe"
evaluate "$output/after" --pretrained_weights "$output/checkpoint.pth"

echo "== 4/4 attention maps of photographs, next to those of the untrained model"
"$PYTHON" visualize_attention.py --pretrained_weights "$output/checkpoint.pth" --data_path demo --num_images 8 \
    --untrained --output_dir "$output/attention"

"$PYTHON" - "$output" <<'PY'
import json
import sys
from pathlib import Path

from evaluation.report import table

output = Path(sys.argv[1])


def top1(when: str) -> tuple[float, float]:
    knn, linear = (json.loads((output / when / f"{name}.json").read_text())["results"] for name in ("eval_knn", "eval_linear"))
    return knn["knn"][0]["top1"], linear["selected"]["val_top1"]


before, after = top1("before"), top1("after")
print()
print(table(["top-1 in percent, 19 classes", "20-NN", "linear"], [
    ["untrained backbone", *before],
    ["after pretraining", *after],
    ["gain", *(b - a for a, b in zip(before, after))],
]))
print(f"""
checkpoint       {output / "checkpoint.pth"}
log              {output / "log.txt"}
report           {output / "report.html"}
TensorBoard      {output / "tensorboard"}     (pip install tensorboard; tensorboard --logdir {output})
attention maps   {output / "attention" / "grid.png"}""")
PY
