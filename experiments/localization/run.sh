#!/usr/bin/env bash
# Does the map find the object? MaxBoxAccV2 and object discovery of the models that experiments/simpool trained.
#   bash experiments/localization/run.sh --data_path raccoon_voc/ --runs output/experiments/simpool
# --data_path holds photographs with boxes (docs/localization.md); --size is the side that the model sees (default 96).
# --output_dir, --seeds and --only are as in experiments/grid.sh. Nothing is trained.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../run_scripts/environment.sh"
boxes='' runs='' output='' size=96 seeds=(0 1 2) only=() failed=0
while [ $# -gt 0 ]; do
    case $1 in
    --data_path) boxes=$(realpath "${2:?"$1 needs a value"}") && shift 2 ;;
    --runs) runs=$(realpath -m "${2:?"$1 needs a value"}") && shift 2 ;;
    --output_dir) output=$(realpath -m "${2:?"$1 needs a value"}") && shift 2 ;;
    --only)
        shift
        while [ $# -gt 0 ] && [[ $1 != --* ]]; do only+=("$1") && shift; done
        ;;
    --size) size=${2:?"$1 needs a value"} && shift 2 ;;
    --seeds)
        seeds=() && shift
        while [ $# -gt 0 ] && [[ $1 != --* ]]; do seeds+=("$1") && shift; done
        ;;
    *) echo "$1 is no flag of this script; see its first lines" >&2 && exit 2 ;;
    esac
done
[ -n "$boxes" ] || { echo "give the photographs: bash $0 --data_path FOLDER --runs RUNS" >&2 && exit 2; }
output=${output:-$root/output/experiments/localization} runs=${runs:-$root/output/experiments/simpool}
use_environment || exit 1
cd "$root"
for label in vit_official vit_simpool resnet_official resnet_simpool; do
    for seed in "${seeds[@]}"; do
        run=$runs/$label/seed$seed folder=$output/$label/seed$seed
        [ -e "$folder/DONE" ] && continue
        [ ${#only[@]} -eq 0 ] || [[ " ${only[*]} " == *" $label "* ]] || continue
        [ -e "$run/DONE" ] || { echo "$run is no finished run: bash experiments/simpool/run.sh first" >&2 && failed=1 && continue; }
        mkdir -p "$folder"
        echo "== $label, seed $seed"
        complete=1
        for protocol in maxboxacc dino_seg; do
            [[ "$label $protocol" = resnet_*" dino_seg" ]] && continue # thresholds the attention of patches
            how=(--image_size "$size")
            [ "$protocol" = dino_seg ] && how=(--max_side "$size")
            [ "$label" = resnet_official ] && how+=(--map norm) # average pooling has no attention
            "$PYTHON" eval_localization.py --pretrained_weights "$run/checkpoint.pth" --data_path "$boxes" \
                --protocol "$protocol" "${how[@]}" --output_dir "$folder" || complete=''
        done
        cp "$run/config.json" "$folder/"
        if [ "$complete" ]; then touch "$folder/DONE"; else failed=1; fi
    done
done
echo "tables: $PYTHON -m experiments.tables localization --runs $output"
exit "$failed"
