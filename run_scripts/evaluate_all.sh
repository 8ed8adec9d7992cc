#!/usr/bin/env bash
# Run every evaluation of a checkpoint, and print one table of the results.
#   run_scripts/evaluate_all.sh CHECKPOINT DATA [OUTPUT_DIR]
#   EPOCHS=100 BATCH=128 NPROC=8 WORKERS=10 run_scripts/evaluate_all.sh output/checkpoint.pth /path/to/imagenet
# OUTPUT_DIR defaults to CHECKPOINT with -evaluation in place of .pth. Run again, it resumes an unfinished probe.
# Exits with code 1 if an evaluation failed; the table still shows the results of the others.
set -uo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CHECKPOINT DATA [OUTPUT_DIR]   (EPOCHS, BATCH, NPROC, WORKERS, LOW_SHOT_DRAW in the environment)" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
checkpoint=$(realpath -m "$1") data=$2 output=$(realpath -m "${3:-${1%.pth}-evaluation}")
[ -e "$data" ] && data=$(realpath "$data")
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

run "k-NN and low-shot k-NN" "${launch[@]}" eval_knn.py "${common[@]}" "${batch[@]}" --low_shot --low_shot_draw "${LOW_SHOT_DRAW:-files}"
run "logistic regression" "${launch[@]}" eval_linear.py "${common[@]}" "${batch[@]}" --logistic
run "linear probes" "${launch[@]}" eval_linear.py "${common[@]}" "${batch[@]}" --epochs "${EPOCHS:-100}"
run "attention maps" "$PYTHON" visualize_attention.py --pretrained_weights "$checkpoint" --data_path "$data" \
    --output_dir "$output/attention" --threshold 0.6 --untrained

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
