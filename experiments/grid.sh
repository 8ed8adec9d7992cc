# Sourced by the experiments' run.sh: `settle "$@"` reads their common flags, `variant LABEL FLAGS...` trains one variant
# with every seed, and `finish` says what to do with the runs. A run.sh sets `program` if it trains with another one than
# main_supervised.py, and defines `measure FOLDER` if finished runs are evaluated; what that leaves in FOLDER counts. Flags:
#   --data_path DATA     images with labels, anything that --data_path of the program takes (required)
#   --output_dir FOLDER  where the runs go, one folder LABEL/seedN each (default: output/experiments/NAME)
#   --seeds N [N ...]    default: 0 1 2
#   --only LABEL [...]   some of the variants (default: all)
#   --subset N           the first N training images of each class, for the evaluations too (default: all)
# All other flags go to the program, after the experiment's own, so that they win: --arch, --epochs, --recipe ...
# Start the same command again to continue: finished runs are left out, and an interrupted one goes on where it was.
# From the environment: NPROC processes (default: one per visible GPU; 1 without a GPU).

source "$(dirname "${BASH_SOURCE[0]}")/../run_scripts/environment.sh"

program=(main_supervised.py)

settle() {
    experiment=$(basename "$(cd "$(dirname "$0")" && pwd)")
    data='' output='' seeds=() only=() more=() subset=() failed=()
    while [ $# -gt 0 ]; do
        case $1 in
        --data_path | --data-path) data=${2:?"$1 needs a value"} && shift 2 ;;
        --output_dir | --output-dir) output=${2:?"$1 needs a value"} && shift 2 ;;
        --data_path=* | --data-path=*) data=${1#*=} && shift ;;
        --output_dir=* | --output-dir=*) output=${1#*=} && shift ;;
        --subset) subset=(--subset "${2:?"$1 needs a value"}") && more+=("${subset[@]}") && shift 2 ;;
        --subset=*) subset=("$1") && more+=("$1") && shift ;;
        --seeds)
            shift
            while [ $# -gt 0 ] && [[ $1 != --* ]]; do seeds+=("$1") && shift; done
            ;;
        --only)
            shift
            while [ $# -gt 0 ] && [[ $1 != --* ]]; do only+=("$1") && shift; done
            ;;
        *) more+=("$1") && shift ;;
        esac
    done
    if [ -z "$data" ]; then
        echo "give the images: bash $0 --data_path /path/to/imagenet (or demo, for the built-in ones)" >&2
        exit 2
    fi
    [ ${#seeds[@]} -gt 0 ] || seeds=(0 1 2)
    for seed in "${seeds[@]}"; do
        [[ $seed =~ ^[0-9]+$ ]] || { echo "--seeds $seed: give whole numbers" >&2 && exit 2; }
    done
    [ -e "$data" ] && data=$(realpath "$data")
    output=$(realpath -m "${output:-$root/output/experiments/$experiment}")
    use_environment || exit 1
    local processes=${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    launch=("$PYTHON")
    if [ "$processes" -gt 1 ]; then
        use_torchrun
        launch=("${TORCHRUN[@]}" --standalone --nproc_per_node "$processes")
    fi
    cd "$root" || exit 1
    known=()
}

variant() { # label, flags of the program
    local label=$1 seed folder
    shift
    known+=("$label")
    if [ ${#only[@]} -gt 0 ] && [[ " ${only[*]} " != *" $label "* ]]; then return 0; fi
    for seed in "${seeds[@]}"; do
        folder=$output/$label/seed$seed
        if [ -e "$folder/DONE" ]; then
            echo "== $label, seed $seed: trained"
        else
            echo "== $label, seed $seed: $folder"
            try "$label, seed $seed" "$folder" \
                "${launch[@]}" "${program[@]}" "$@" "${more[@]}" --data_path "$data" --output_dir "$folder" --seed "$seed" ||
                continue
        fi
        if declare -F measure >/dev/null && [ ! -e "$folder/MEASURED" ]; then
            try "$label, seed $seed: evaluation" "$folder" measure "$folder" && touch "$folder/MEASURED"
        fi
    done
    return 0
}

try() { # what, folder of the run, command...
    local what=$1 folder=$2 code=0
    shift 2
    "$@" || code=$?
    if [ "$code" -eq 75 ] || [ -e "$folder/PREEMPTED" ] || [ "$code" -ge 128 ]; then
        echo "stopped; the same command continues" >&2
        exit 75
    fi
    [ "$code" -eq 0 ] || failed+=("$what (exit code $code)")
    return "$code"
}

finish() { # prints what failed and what follows; the exit code tells if anything failed
    local label
    for label in "${only[@]}"; do
        if [[ " ${known[*]} " != *" $label "* ]]; then
            echo "--only $label: no such variant; there are ${known[*]}" >&2
            exit 2
        fi
    done
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'failed: %s\n' "${failed[@]}" >&2
        echo "the others are complete; fix the cause and start the same command again" >&2
    fi
    echo "tables: $PYTHON -m experiments.tables $experiment --runs $output"
    [ ${#failed[@]} -eq 0 ]
}
