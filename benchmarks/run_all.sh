#!/usr/bin/env bash
# Run every benchmark and write what they print into docs/performance.md, between its two markers.
#   benchmarks/run_all.sh [IMAGES]      IMAGES: a folder of image files for the loading benchmarks; left out without it
# OMP_NUM_THREADS is respected: set it to 1 on a machine that does other work, where threads wait for each other.
# About half an hour on 2 cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../run_scripts/environment.sh"
cd "$root"
use_environment
out=$(mktemp)
trap 'rm -f "$out"' EXIT

section() { # title, module, flags...
    local title=$1
    shift
    echo "$title: python -m $*" >&2
    printf '\n### %s\n\n`python -m %s`\n\n' "$title" "$*" >>"$out"
    local printed
    printed=$("$PYTHON" -m "$@")
    if grep -q '^|' <<<"$printed"; then # a table stays one; lines after it become paragraphs
        sed -e '/^|/!s/^/\n/' <<<"$printed" >>"$out"
    else
        printf '```\n%s\n```\n' "$printed" >>"$out"
    fi
}

for amp in none bf16; do
    section "Step, ViT-S/16, autocast $amp" benchmarks.train_step --arch vit_small --amp "$amp"
    section "Step, ViT-T/16, autocast $amp" benchmarks.train_step --arch vit_tiny --amp "$amp"
    section "Step, ResNet-50, autocast $amp" benchmarks.train_step --arch resnet50 --out_dim 4096 --amp "$amp"
done
section "Step, each change alone" benchmarks.train_step --arch vit_small --each true --rounds 3
section "Update" benchmarks.optimizer
section "Start-up" benchmarks.startup
section "SimPool layer" benchmarks.simpool_layer
section "Head and loss" benchmarks.head_loss
section "k-NN" benchmarks.knn
section "Linear probe" benchmarks.linear_probe --batch 32
section "File list" benchmarks.file_list_memory
if [ $# -gt 0 ]; then
    section "Augmentation" benchmarks.augmentation --data_path "$1"
    section "Loading for evaluation" benchmarks.eval_loading --data_path "$1"
fi

"$PYTHON" -m benchmarks.into_docs "$out" docs/performance.md
