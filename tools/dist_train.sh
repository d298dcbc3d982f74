#!/usr/bin/env bash
# Train in several processes, one a GPU (without a GPU: on the CPU), on one machine or many:
#   tools/dist_train.sh CONFIG GPUS [arguments of train.py]
# GPUS is the number on this machine. Environment: PYTHON, NNODES, NODE_RANK, MASTER_ADDR, PORT, or RDZV_ENDPOINT,
# RDZV_ID; MAX_RESTARTS. docs/scaling.md has examples.
set -u
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 2 ]; then
    echo "error: usage: dist_train.sh CONFIG GPUS [arguments of train.py], got: $*" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2
python=${PYTHON:-$tools/../.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python
exec "$python" "$tools/launch.py" "$gpus" "$tools/train.py" "$config" --launcher pytorch "$@"
