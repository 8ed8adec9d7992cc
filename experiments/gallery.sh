#!/usr/bin/env bash
# The pictures of docs/gallery.md, from models that the questions trained; which images are shown is drawn, not chosen.
#   bash experiments/gallery.sh --photos imagenet_sample/ --boxes raccoon_voc/ --runs output/experiments
# --runs holds the runs of experiments/simpool. --photos is any folder of photographs, --boxes one with boxes
# (docs/localization.md). --seed (default 0) draws the photographs; --size (default 96) is the side that the models see.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../run_scripts/environment.sh"
photos='' boxes='' runs=$root/output/experiments output=$root/docs/gallery seed=0 size=96 count=6
while [ $# -gt 0 ]; do
    case $1 in
    --photos) photos=$(realpath "${2:?"$1 needs a value"}") && shift 2 ;;
    --boxes) boxes=$(realpath "${2:?"$1 needs a value"}") && shift 2 ;;
    --runs) runs=$(realpath "${2:?"$1 needs a value"}") && shift 2 ;;
    --output_dir) output=$(realpath -m "${2:?"$1 needs a value"}") && shift 2 ;;
    --seed) seed=${2:?"$1 needs a value"} && shift 2 ;;
    --size) size=${2:?"$1 needs a value"} && shift 2 ;;
    *) echo "$1 is no flag of this script; see its first lines" >&2 && exit 2 ;;
    esac
done
[ -n "$photos" ] && [ -n "$boxes" ] || { echo "give the images: bash $0 --photos FOLDER --boxes FOLDER" >&2 && exit 2; }
cls=$runs/simpool/vit_official/seed0/checkpoint.pth
simpool=$runs/simpool/vit_simpool/seed0/checkpoint.pth
for checkpoint in "$cls" "$simpool"; do
    [ -e "$checkpoint" ] || { echo "$checkpoint is missing: run experiments/simpool first" >&2 && exit 2; }
done
use_environment || exit 1
cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mapfile -d '' -t drawn < <("$PYTHON" - "$photos" "$seed" "$count" <<'PY'
import random, sys
from pathlib import Path

kinds = {".jpg", ".jpeg", ".png", ".webp"}
photos = sorted(path for path in Path(sys.argv[1]).rglob("*") if path.suffix.lower() in kinds)
for path in random.Random(int(sys.argv[2])).sample(photos, min(int(sys.argv[3]), len(photos))):
    print(path, end="\0")
PY
)
mkdir -p "$output"
keep() { # picture, name: a JPEG of it, because the pages of a repository should load fast
    "$PYTHON" -c 'import sys; from PIL import Image; Image.open(sys.argv[1]).convert("RGB").save(sys.argv[2], quality=85)' \
        "$1" "$output/$2.jpg"
}
"$PYTHON" visualize_attention.py --pretrained_weights "$cls" "$simpool" --titles "[CLS]" SimPool --untrained \
    --image_path "${drawn[@]}" --image_size "$size" "$size" --output_dir "$work/attention"
keep "$work/attention/grid.png" attention
"$PYTHON" visualize_attention.py --pretrained_weights "$cls" --masks --mask_ratio 0.4 \
    --image_path "${drawn[@]}" --image_size "$size" "$size" --output_dir "$work/masks"
keep "$work/masks/masks.png" masks
for model in cls simpool; do
    "$PYTHON" eval_localization.py --pretrained_weights "${!model}" --data_path "$boxes" --protocol maxboxacc \
        --image_size "$size" --output_dir "$work/$model"
    keep "$work/$model/eval_localization_maxboxacc_random.png" "boxes_$model"
done
echo "pictures: $output"
