#!/usr/bin/env bash
# Run every benchmark and write what they print into docs/performance.md, between its two markers.
#   benchmarks/run_all.sh [--quick] [IMAGES]
#     IMAGES   a folder of image files for the loading benchmarks, which are left out without it
#     --quick  small sizes and one round, a few minutes: shows that all of them run; printed, not written
# Finished tables are kept in build/benchmarks. If interrupted, it writes those it has; started again on the same
# commit, it continues with the rest. A benchmark that fails leaves its last line in place of a table, and code 1 at the
# end. Set OMP_NUM_THREADS to 1 on a machine that does other work, where threads would wait for each other.
# Takes about half an hour on 2 otherwise idle cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../run_scripts/environment.sh"
cd "$root"
use_environment >&2

quick=
if [ "${1-}" = "--quick" ]; then
    quick=-quick
    shift
fi
tables=${TABLES:-build/benchmarks}/$(git rev-parse --short HEAD 2>/dev/null || echo unknown)$quick
mkdir -p "$tables"
document=${DOCUMENT:-docs/performance.md}
number=0
child=
failed=0
unfinished="Interrupted: the rest is missing."

section() { # title, flags of the quick form, module, flags...
    local title=$1 short=$2 file printed
    shift 2
    number=$((number + 1))
    file=$(printf '%s/%02d.md' "$tables" "$number")
    [ -s "$file" ] && return
    [ -n "$quick" ] && set -- "$@" $short
    echo "$title: python -m $*" >&2
    "$PYTHON" -m "$@" >"$tables/printed" 2>"$tables/errors" & # in the background, so that a signal is handled at once
    child=$!
    if wait "$child"; then
        printed=$(cat "$tables/printed")
    else
        failed=1
        printed=$(printf '%s\nfailed: %s' "$(cat "$tables/printed")" "$(tail -n 1 "$tables/errors")")
        echo "$printed" >&2
        file=$file.failed
    fi
    {
        printf '\n### %s\n\n`python -m %s`\n\n' "$title" "$*"
        if grep -q '^|' <<<"$printed"; then # a table stays a table; lines after it become paragraphs
            sed -e '/^|/!s/^/\n/' <<<"$printed"
        else
            printf '```\n%s\n```\n' "$printed"
        fi
    } >"$file.part"
    mv "$file.part" "$file"
}

collect() {
    local all
    all=$(mktemp)
    find "$tables" -name '[0-9]*.md*' ! -name '*.part' | sort | xargs -r cat >"$all"
    [ -n "$unfinished" ] && printf '\n%s\n' "$unfinished" >>"$all"
    if [ -n "$quick" ]; then
        cat "$all"
    elif [ -s "$all" ]; then
        "$PYTHON" -m benchmarks.into_docs "$all" "$document"
    fi
    rm -f "$all"
    find "$tables" -name '*.failed' -delete # to be tried again next time
}
trap collect EXIT
trap 'kill "$child" 2>/dev/null; exit 130' INT TERM

for amp in none bf16; do
    small="--rounds 1 --out_dim 256 --local_crops_number 2"
    section "Step, ViT-S/16, autocast $amp" "$small" benchmarks.train_step --arch vit_small --amp "$amp"
    section "Step, ViT-T/16, autocast $amp" "$small" benchmarks.train_step --arch vit_tiny --amp "$amp"
    section "Step, ResNet-50, autocast $amp" "$small" benchmarks.train_step --arch resnet50 --out_dim 4096 --amp "$amp"
done
for amp in none bf16; do
    section "AttMask step, ViT-S/16, autocast $amp" "--rounds 1 --batch_size 2 --out_dim 256 --local_crops_number 2" \
        benchmarks.attmask_step --amp "$amp"
    section "Supervised step, ViT-S/16, autocast $amp" "--rounds 1 --batch_size 2 --img_size 32" \
        benchmarks.supervised_step --amp "$amp"
done
section "Step, each change alone" "$small --arch vit_tiny" benchmarks.train_step --arch vit_small --each true --rounds 3
section "Update" "--rounds 1 --out_dim 256" benchmarks.optimizer
section "Start-up" "--rounds 1" benchmarks.startup
section "SimPool layer" "--rounds 1" benchmarks.simpool_layer
section "Pooling operators" "--rounds 1" benchmarks.poolings
section "Head and loss" "--rounds 1 --batch_size 4 --out_dim 1024" benchmarks.head_loss
section "k-NN" "--rounds 1 --images 2000 --queries 200" benchmarks.knn
section "Linear probe" "--rounds 1 --batch 2 --heads 1 10" benchmarks.linear_probe --batch 32
section "Probes" "--rounds 1 --batch 2" benchmarks.probes
section "Boxes of attention maps" "--maps 1 --rounds 1" benchmarks.max_box
section "File list" "--entries 10000 --workers 2 --list_workers 1" benchmarks.file_list_memory
if [ $# -gt 0 ]; then
    section "Augmentation" "--rounds 1 --images 8 --batch_size 4" benchmarks.augmentation --data_path "$1"
    section "Loading for evaluation" "--rounds 1 --images 8" benchmarks.eval_loading --data_path "$1"
fi
unfinished=
trap - EXIT
collect
[ "$failed" -eq 0 ] && rm -r "$tables"
exit "$failed"
