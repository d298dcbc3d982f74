#!/usr/bin/env bash
# Train on a Slurm cluster: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]
# Environment: GPUS (of all nodes together, 8), GPUS_PER_NODE (8), CPUS_PER_TASK (for each GPU, 5), SRUN_ARGS, PORT,
# MAX_RESTARTS.
set -u
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 4 ]; then
    echo "error: usage: slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py], got: $*" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 work_dir=$4
shift 4
exec bash "$tools/slurm_nodes.sh" "$partition" "$job" "$tools/dist_train.sh" "$config" GPUS --work-dir "$work_dir" "$@"
