# Sourced by the batch scripts here: sets up Python and the meeting point, and defines `launch PROGRAM flags...`, which
# runs a program in every task of the job. From the environment: OUT (output folder), DATA (images), LAUNCHER (srun or
# torchrun).
#
# NCCL needs no settings if it chooses the right network. If ranks cannot connect, or only slowly, name the interface:
# NCCL_SOCKET_IFNAME=ib0 (or eth0 ...), NCCL_IB_HCA=mlx5 for the InfiniBand adapters; NCCL_DEBUG=INFO prints the choice.
# Variables exported before sbatch reach every task.

root=${SLURM_SUBMIT_DIR:-$PWD}
if [ ! -f "$root/main_dino.py" ]; then
    echo "submit from the project's folder: $root holds no main_dino.py" >&2
    exit 2
fi
for name in OUT DATA; do
    if [ -z "${!name:-}" ]; then
        echo "set $name, for instance: DATA=/path/to/imagenet OUT=output/run sbatch $0" >&2
        exit 2
    fi
done
cd "$root"
source "$root/run_scripts/environment.sh"
use_environment
mkdir -p "$OUT/logs"

# The ranks meet on the first node. The port follows from the job's number, below the range that systems assign.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID * 31 % 12000))
export MASTER_ADDR MASTER_PORT
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer takes it from sbatch

launch() { # program, flags...
    local tasks_per_node=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}
    # One file per rank (per node under torchrun), continued when the job is requeued.
    local step=(--kill-on-bad-exit=1 --open-mode=append --output="${OUT//%/%%}/logs/%x-%t.txt")  # srun reads %% as %
    echo "$(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
    if [ "${LAUNCHER:-srun}" = torchrun ]; then
        use_torchrun
        srun "${step[@]}" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${TORCHRUN[@]}" \
            --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$tasks_per_node" --rdzv_backend c10d \
            --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" "$@"
    else
        srun "${step[@]}" "$PYTHON" "$@"
    fi
}

require_done() { # a preempted job may exit with 0 too: only the marker shows that the pretraining is complete
    if [ ! -e "$OUT/DONE" ]; then
        echo "$OUT has no DONE marker: its pretraining is not complete, so there is nothing to evaluate yet" >&2
        exit 1
    fi
}
