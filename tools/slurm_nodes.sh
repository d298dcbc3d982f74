#!/usr/bin/env bash
# Run dist_train.sh or dist_test.sh once on every node of a Slurm job; slurm_train.sh and slurm_test.sh call this:
#   slurm_nodes.sh PARTITION JOB_NAME SCRIPT [arguments of SCRIPT, the word GPUS for the number of a node]
set -u
partition=$1 job=$2
shift 2
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8} cpus=${CPUS_PER_TASK:-5}
for setting in "GPUS=$gpus" "GPUS_PER_NODE=$per_node" "CPUS_PER_TASK=$cpus"; do
    if ! [[ ${setting#*=} =~ ^[1-9][0-9]*$ ]]; then
        echo "error: $setting: a whole number of at least 1 is expected" >&2
        exit 2
    fi
done
[ "$gpus" -ge "$per_node" ] || per_node=$gpus
if [ $((gpus % per_node)) -ne 0 ]; then
    echo "error: GPUS=$gpus is no multiple of GPUS_PER_NODE=$per_node:" \
        "torchrun starts as many processes on every node" >&2
    exit 2
fi
if ! command -v srun >/dev/null; then
    echo "error: no srun here: start this on a node of the Slurm cluster," \
        "or use tools/dist_train.sh or dist_test.sh" >&2
    exit 2
fi
export NNODES=$((gpus / per_node))
arguments=()
for argument in "$@"; do
    if [ "$argument" = GPUS ]; then argument=$per_node; fi
    arguments+=("$argument")
done
# shellcheck disable=SC2016,SC2086  (expanded on the node; SRUN_ARGS holds several words)
exec srun --partition="$partition" --job-name="$job" --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 \
    --gres=gpu:"$per_node" --cpus-per-task=$((cpus * per_node)) --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    bash -c '
        first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
        export RDZV_ENDPOINT=$first:${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
        export RDZV_ID=$SLURM_JOB_ID.$SLURM_STEP_ID
        exec bash "$@"' slurm_nodes.sh "${arguments[@]}"
