# Sourced by the recipe scripts: `recipe GLOBAL_BATCH flags...` runs a training program ($program, main_dino.py by
# default) with the published global batch on the available hardware. From the environment:
#   DATA    ImageNet as train/ and val/ class folders, or anything else --data_path takes (required)
#   OUT     output folder (default: output/NAME OF THE SCRIPT)
#   NPROC   processes (default: one per visible GPU; 1 without a GPU)
# Arguments of the script are passed on, so `--dry_run` prints the resolved configuration and stops.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

recipe() {
    local global_batch=$1
    shift
    if [ -z "${DATA:-}" ]; then
        echo "set DATA to the images, for instance: DATA=/path/to/imagenet bash $0" >&2
        return 2
    fi
    [ -e "$DATA" ] && DATA=$(realpath "$DATA")
    local out=${OUT:-$root/output/$(basename "$0" .sh)}
    use_environment || return 1
    local processes=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    local launch=("$PYTHON")
    if [ "$processes" -gt 1 ]; then
        use_torchrun
        launch=("${TORCHRUN[@]}" --standalone --nproc_per_node "$processes")
    fi
    cd "$root"
    set -x
    exec "${launch[@]}" "${program:-main_dino.py}" --data_path "$DATA" --output_dir "$out" --global_batch_size "$global_batch" "$@"
}
