#!/usr/bin/env bash
# Run every evaluation of a checkpoint, and print one table of the results.
#   run_scripts/evaluate_all.sh CHECKPOINT DATA [OUTPUT_DIR]
#   EPOCHS=100 BATCH=128 NPROC=8 WORKERS=10 run_scripts/evaluate_all.sh output/checkpoint.pth /path/to/imagenet
#   run_scripts/evaluate_all.sh output/checkpoint.pth VOCdevkit/VOC2007          # boxes: localisation and discovery
#   BOXES=metadata/ILSVRC/test IN9=bg_challenge run_scripts/evaluate_all.sh output/checkpoint.pth /path/to/imagenet
# k-NN and probes need class folders; localisation runs if DATA holds boxes or BOXES names them (docs/localization.md).
# MAX_SIDE bounds the images of DINO-seg and LOST, which otherwise keep their size.
# OUTPUT_DIR defaults to CHECKPOINT with -evaluation in place of .pth. Run again, it resumes an unfinished probe.
# Exits with code 1 if an evaluation failed; the table still shows the results of the others.
set -uo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CHECKPOINT DATA [OUTPUT_DIR]   (EPOCHS, BATCH, NPROC, WORKERS, LOW_SHOT_DRAW, BOXES, IN9, MAX_SIDE in the environment)" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
checkpoint=$(realpath -m "$1") data=$2 output=$(realpath -m "${3:-${1%.pth}-evaluation}")
[ -e "$data" ] && data=$(realpath "$data")
[ -n "${BOXES:-}" ] && BOXES=$(realpath -m "$BOXES")
[ -n "${IN9:-}" ] && IN9=$(realpath -m "$IN9")
cd "$root"
use_environment || exit 1

launch=("$PYTHON")
if [ "${NPROC:-1}" -gt 1 ]; then
    use_torchrun
    launch=("${TORCHRUN[@]}" --standalone --nproc_per_node "$NPROC")
fi
common=(--pretrained_weights "$checkpoint" --data_path "$data" --output_dir "$output")
batch=(--batch_size_per_gpu "${BATCH:-128}" --num_workers "${WORKERS:-10}")
failed=()

run() { # name, command...
    local name=$1 code=0
    shift
    echo "== $name"
    "$@" || code=$?
    [ "$code" -eq 130 ] && exit 130
    [ "$code" -eq 0 ] || failed+=("$name (code $code)")
}

# Which of "labels" and "boxes" the data has.
read -ra has <<<"$("$PYTHON" - "$data" "${BOXES:-}" <<'PY'
import sys

from data.boxes import find_boxes
from data.boxes_formats import kind_of

found = find_boxes(sys.argv[1])
labels = found is None or kind_of(found) != "voc"
print("labels" if labels else "", "boxes" if sys.argv[2] or found is not None else "")
PY
)"

if [[ " ${has[*]} " == *" labels "* ]]; then
    run "k-NN and low-shot k-NN" "${launch[@]}" eval_knn.py "${common[@]}" "${batch[@]}" --low_shot --low_shot_draw "${LOW_SHOT_DRAW:-files}"
    run "logistic regression" "${launch[@]}" eval_linear.py "${common[@]}" "${batch[@]}" --logistic
    run "linear probes" "${launch[@]}" eval_linear.py "${common[@]}" "${batch[@]}" --epochs "${EPOCHS:-100}"
else
    echo "== k-NN and probes are left out: $data has no class folders"
fi
run "attention maps" "$PYTHON" visualize_attention.py --pretrained_weights "$checkpoint" --data_path "$data" \
    --output_dir "$output/attention" --threshold 0.6 --untrained
run "maps without boxes" "${launch[@]}" eval_localization.py "${common[@]}" "${batch[@]}" --protocol summary
if [[ " ${has[*]} " == *" boxes "* ]]; then
    boxes=(--num_workers "${WORKERS:-10}" ${BOXES:+--annotations "$BOXES"})
    run "MaxBoxAccV2" "${launch[@]}" eval_localization.py "${common[@]}" "${boxes[@]}" --protocol maxboxacc
    for protocol in dino_seg lost; do
        run "$protocol" "${launch[@]}" eval_localization.py "${common[@]}" "${boxes[@]}" --protocol "$protocol" \
            --max_side "${MAX_SIDE:-0}"
    done
else
    echo "== localisation is left out: $data holds no boxes, and BOXES names none"
fi
if [ -n "${IN9:-}" ]; then
    run "ImageNet-9" "${launch[@]}" eval_background.py --pretrained_weights "$checkpoint" --data_path "$IN9" \
        --output_dir "$output" "${batch[@]}"
fi

echo "== $checkpoint"
"$PYTHON" - "$output" <<'PY' || exit 1
import sys

from evaluation.report import evaluation_tables, summary, write_report

if not evaluation_tables(sys.argv[1]):
    sys.exit("no evaluation succeeded: see the errors above")
print(summary(sys.argv[1]))
print(f"page: {write_report(sys.argv[1])}")
PY
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
