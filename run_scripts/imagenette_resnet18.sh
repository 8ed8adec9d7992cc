#!/usr/bin/env bash
# ResNet-18 on Imagenette at 128 pixels, 200 epochs.
#   DATA=/path/to/imagenette bash run_scripts/imagenette_resnet18.sh
# lightly's Imagenette benchmark, 1 GPU x 256 images; hours not published.
# Published there: 87.3 % k-NN (k = 200) of the student (eval_knn.py --checkpoint_key student). Not reproduced here.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
recipe 256 --recipe imagenette --arch resnet18 --mode official "$@"
