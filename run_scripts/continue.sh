#!/usr/bin/env bash
# Continue on images of one's own from a trained backbone, published or ours, without losing what it has learned.
#   DATA=/path/to/images CHECKPOINT=/path/to/checkpoint.pth bash run_scripts/continue.sh
# A tenth of the published rate, a slow teacher, and a new head that learns alone for two epochs. Global batch 64. From
# the environment, besides recipe.sh's: CHECKPOINT, and KEY=teacher (default) or student, the backbone that is taken.
set -euo pipefail
if [ -z "${CHECKPOINT:-}" ]; then
    echo "set CHECKPOINT to the trained model, for instance: CHECKPOINT=output/run/checkpoint.pth bash $0" >&2
    exit 2
fi
CHECKPOINT=$(realpath "$CHECKPOINT")
source "$(dirname "$0")/recipe.sh"
recipe 64 --recipe continue --init_from "$CHECKPOINT" --checkpoint_key "${KEY:-teacher}" "$@"
