#!/usr/bin/env bash
# Evaluate in several processes, one a GPU (without a GPU: on the CPU), on one machine or many:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
# GPUS is the number on this machine. Environment: as for dist_train.sh.
set -u
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 3 ]; then
    echo "error: usage: dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py], got: $*" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3
python=${PYTHON:-$tools/../.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python
exec "$python" "$tools/launch.py" "$gpus" "$tools/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
