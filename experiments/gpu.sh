#!/usr/bin/env bash
# Everything that only a GPU shows, in about 40 minutes: tests, rates, memory, k-NN at ImageNet's size, exact resume; then,
# as long as the machine is yours, the long runs.
#   bash experiments/gpu.sh --data_path /path/to/images [--output_dir output/gpu] [--only PART ...] [--skip PART ...]
#   bash experiments/gpu.sh --rehearse                     every part at toy size, on whatever processor there is
# Parts, in their order:
#   tests       the tests that need a GPU
#   rates       images per second of ViT-S, ViT-B, ResNet-50 and ConvNeXt-S: bf16, fp16, TF32, batches of 32 to 256
#   compile     the same for ViT-S and ResNet-50 with and without torch.compile
#   losses      head and loss: plain, in place and fused
#   step        the step beside the plain one
#   colour      the colour stage
#   knn         k-NN of 50,000 queries in 1.28 million images, width 384
#   resume      a run that is stopped in an epoch and continued ends with the same weights, with --deterministic true
#   cifar       CIFAR-10, ResNet-18, 200 epochs (CIFAR must name its folder with train/ and val/)
#   simpool     experiments/simpool at full length (CIFAR, EPOCHS: 200)
#   attmask     experiments/attmask at full length
#   pooling     experiments/pooling at full length
# Each part prints to OUTPUT_DIR/PART.md and is left out the next time if it went well.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../run_scripts/environment.sh"

parts=(tests rates compile losses step colour knn resume cifar simpool attmask pooling)
data='' output=$root/output/gpu rehearse='' only=() skip=() failed=()
while [ $# -gt 0 ]; do
    case $1 in
    --data_path) data=$(realpath -m "${2:?"$1 needs a value"}") && shift 2 ;;
    --output_dir) output=$(realpath -m "${2:?"$1 needs a value"}") && shift 2 ;;
    --rehearse) rehearse=1 && shift ;;
    --only | --skip)
        list=${1#--} && shift
        while [ $# -gt 0 ] && [[ $1 != --* ]]; do
            [[ " ${parts[*]} " == *" $1 "* ]] || { echo "--$list $1: no such part; there are ${parts[*]}" >&2 && exit 2; }
            [ "$list" = only ] && only+=("$1") || skip+=("$1")
            shift
        done
        ;;
    *) echo "$1 is no flag of this script; see its first lines" >&2 && exit 2 ;;
    esac
done
if [ -z "$data" ] && [ -z "$rehearse" ]; then
    echo "give some images: bash $0 --data_path /path/to/images, or --rehearse" >&2
    exit 2
fi
use_environment pytest -- "pytest>=8" || exit 1
cd "$root"
data=${data:-demo} cifar=${CIFAR:-demo}
mkdir -p "$output"

toy="--img_size 32 --patch_size 8 --local_crops_size 16 --out_dim 64"
toy_vit=(--arch vit_tiny --patch_size 8 --embed_dim 24 --depth 2 --num_heads 2 --img_size 32 --epochs 1 --num_workers 0)

real() { # true, or false in a rehearsal
    [ -z "$rehearse" ]
}

python_m() {
    "$PYTHON" -m "$@"
}

tests() {
    if real; then
        python_m pytest -q -rs tests/test_step_on_cuda.py tests/data/test_colour.py
    else
        python_m pytest -q --collect-only tests/test_step_on_cuda.py
    fi
}

rates() {
    if real; then
        python_m benchmarks.throughput --data_path "$data" --batch_size 32 64 128 256 --steps 10
    else
        python_m benchmarks.throughput --arch vit_tiny resnet18 --precision bf16 --batch_size 2 --steps 1 --num_workers 0 \
            --flags "$toy"
    fi
}

compile() {
    if real; then
        python_m benchmarks.throughput --data_path "$data" --arch vit_small resnet50 --precision bf16 --compile false true \
            --batch_size 128 --steps 10
    else
        python_m benchmarks.throughput --arch vit_tiny --precision fp32 --batch_size 2 --steps 1 --num_workers 0 --flags "$toy"
    fi
}

losses() {
    if real; then python_m benchmarks.head_loss; else python_m benchmarks.head_loss --rounds 1 --batch_size 2 --out_dim 64; fi
}

step() {
    if real; then
        python_m benchmarks.train_step --arch vit_small --amp bf16 --batch_size 32 --data_path "$data"
    else
        python_m benchmarks.train_step --arch vit_tiny --batch_size 2 --out_dim 64 --local_crops_number 1 --rounds 1
    fi
}

colour() {
    if real; then
        python_m benchmarks.augmentation --data_path "$data"
        return
    fi
    "$PYTHON" - "$output/photographs" <<'PY' || return
import pathlib
import sys

from PIL import Image

from data.demo import read_photograph

folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
for name in ("astronaut", "cat", "coffee", "rocket"):
    Image.fromarray(read_photograph(name)).save(folder / f"{name}.jpg")
PY
    python_m benchmarks.augmentation --data_path "$output/photographs" --rounds 1 --images 4 --batch_size 2
}

knn() {
    if real; then
        python_m benchmarks.knn --images 1281167 --queries 50000 --width 384 --rounds 1
    else
        python_m benchmarks.knn --images 500 --queries 200 --width 16 --classes 10 --rounds 1
    fi
}

resume() {
    local flags=(--data_path "$data" --deterministic true --report false --eval_every 0) stopped=$output/resume/stopped
    local whole=$output/resume/whole
    if real; then
        flags+=(--arch vit_small --max_steps 40 --batch_size_per_gpu 32)
    else
        flags+=("${toy_vit[@]}" --recipe demo --max_steps 4 --batch_size_per_gpu 4 --device cpu)
    fi
    rm -rf "$output/resume"
    "$PYTHON" main_dino.py "${flags[@]}" --output_dir "$whole" >/dev/null || return
    "$PYTHON" main_dino.py "${flags[@]}" --output_dir "$stopped" --max_steps 2 >/dev/null || return
    "$PYTHON" main_dino.py "${flags[@]}" --output_dir "$stopped" >/dev/null || return
    "$PYTHON" - "$whole" "$stopped" <<'PY'
import sys

import torch

whole, stopped = (torch.load(f"{folder}/checkpoint.pth", map_location="cpu", weights_only=True) for folder in sys.argv[1:])
different = [name for name, value in whole["student"].items() if not torch.equal(value, stopped["student"][name])]
print(f"{len(whole['student']) - len(different)} of {len(whole['student'])} tensors are equal bit for bit")
sys.exit(bool(different))
PY
}

long_run() { # experiment, flags
    local name=$1
    shift
    if real; then
        [ "$cifar" != demo ] || { echo "CIFAR is not set: the folder of CIFAR-10 with train/ and val/" && return 1; }
        bash "experiments/$name/run.sh" --data_path "$cifar" --output_dir "$output/$name" "$@" || return
    else
        bash "experiments/$name/run.sh" --data_path demo --output_dir "$output/$name" --seeds 0 --subset 4 --epochs 1 \
            --embed_dim 32 --depth 2 --num_heads 2 --patch_size 8 --batch_size_per_gpu 4 --num_workers 0 "$@" || return
    fi
    mkdir -p "$output/tables/$name"
    cp "experiments/$name/table.json" "$output/tables/$name/" # the tables of a GPU's runs are kept apart from other ones
    python_m experiments.tables "$name" --runs "$output/$name" --folder "$output/tables"
}

cifar() {
    if real; then
        [ "$cifar" != demo ] || { echo "CIFAR is not set: the folder of CIFAR-10 with train/ and val/" && return 1; }
        "$PYTHON" main_dino.py --arch resnet18 --recipe cifar --epochs 200 --data_path "$cifar" --output_dir "$output/cifar10"
    else
        "$PYTHON" main_dino.py --arch resnet18 --recipe cifar --epochs 1 --max_steps 1 --batch_size_per_gpu 4 --num_workers 0 \
            --data_path demo --output_dir "$output/cifar10" --eval_every 0
    fi
}

simpool() { if real; then long_run simpool --epochs "${EPOCHS:-200}"; else long_run simpool --only vit_simpool; fi; }
attmask() { if real; then long_run attmask --epochs "${EPOCHS:-200}"; else long_run attmask --only rand; fi; }
pooling() {
    if real; then
        long_run pooling --img_size 32 --stem small --epochs "${EPOCHS:-200}"
    else
        long_run pooling --only gap --arch vit_tiny --img_size 32
    fi
}

for part in "${parts[@]}"; do
    [[ ${#only[@]} -eq 0 || " ${only[*]} " == *" $part "* ]] || continue
    [[ " ${skip[*]} " != *" $part "* ]] || continue
    [ -e "$output/$part.done" ] && echo "== $part: done, see $output/$part.md" && continue
    echo "== $part"
    began=$SECONDS
    if "$part" 2>&1 | tee "$output/$part.md"; then
        touch "$output/$part.done"
        echo "== $part: $((SECONDS - began)) s"
    else
        failed+=("$part")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; the same command tries them again" >&2
    exit 1
fi
