#!/usr/bin/env bash
# Run the tests: every one in its quick form, in under 15 minutes on 2 cores.
#   run_scripts/test.sh            quick
#   run_scripts/test.sh --full     the long ones too (about 30 minutes more)
#   run_scripts/test.sh --fast     while typing: under 3 minutes, without whole runs, subprocesses or sleeping
#   run_scripts/test.sh tests/test_sp.py -k gamma     other arguments are passed to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
use_environment pytest xdist ruff -- "pytest>=8" "pytest-xdist>=3.5" "ruff>=0.6"

chosen=(-m "not full")
if [ "${1:-}" = "--full" ]; then
    chosen=()
    shift
elif [ "${1:-}" = "--fast" ]; then
    chosen+=(--fast)
    for whole_runs in reliability benchmarks training/test_toy_method.py training/test_launch.py optim/test_sharding.py \
        test_main_dino.py test_eval_knn.py test_eval_linear.py test_visualize_attention.py test_launchers.py \
        test_run_scripts.py test_submit.py test_record.py test_examples.py test_export.py test_main_attmask.py \
        test_main_supervised.py exporting test_timm_models.py; do
        chosen+=("--ignore=tests/$whole_runs")
    done
    shift
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One thread per process: two workers share two cores, and sums do not depend on the number of cores.
export OMP_NUM_THREADS=1 MPLBACKEND=Agg
workers=$(getconf _NPROCESSORS_ONLN)
exec "$PYTHON" -m pytest -n "$((workers < 4 ? workers : 4))" --dist worksteal "${chosen[@]}" "$@"
