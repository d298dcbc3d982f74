#!/usr/bin/env bash
# Evaluate on a Slurm cluster: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
# Environment: as for slurm_train.sh.
set -u
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 4 ]; then
    echo "error: usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py], got: $*" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 checkpoint=$4
shift 4
exec bash "$tools/slurm_nodes.sh" "$partition" "$job" "$tools/dist_test.sh" "$config" "$checkpoint" GPUS "$@"
