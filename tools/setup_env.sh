#!/usr/bin/env bash
# Make the virtual environment with the pinned stack and this package, editable. What can go wrong gets one line.
#   setup_env.sh VENV                install
#   setup_env.sh VENV --lock         write constraints.txt anew from setup.py
#   setup_env.sh VENV --stack FILE   install what a requirements file names, instead of the pinned stack
set -u
venv=${1:?usage: setup_env.sh VENV [--lock | --stack FILE]}

die() { echo "error: $*" >&2; exit 2; }

# Whether the interpreter $1 is of a version from $2 to $3.
is() { "$1" -c "import sys; sys.exit(not ($2) <= sys.version_info[:2] <= ($3))" 2>/dev/null; }
tried() { is "$1" '3, 10' '3, 13'; }
newer() { is "$1" '3, 14' '3, 99'; }  # may work: it is taken where there is no other

# PYTHON=... chooses; otherwise the first one of these that has been tried, else the first that is newer.
find_python() {
    local fits candidate
    for fits in tried newer; do
        for candidate in ${PYTHON:-python3 python python3.13 python3.12 python3.11 python3.10}; do
            if "$fits" "$candidate"; then echo "$candidate"; return 0; fi
        done
    done
    return 1
}

needed='Python 3.10, 3.11, 3.12 or 3.13 is needed'
if [ -x "$venv/bin/python" ] && ! tried "$venv/bin/python" && ! newer "$venv/bin/python"; then
    die "$venv is an environment of $("$venv/bin/python" --version 2>&1 | head -n 1); $needed." \
        "Remove $venv or move it away."
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then  # not there, or half made by a run that failed
    python=$(find_python) || die "$needed," \
        "found $(${PYTHON:-python3} --version 2>&1 | head -n 1)." \
        "Install one and say which: make PYTHON=/path/to/python3.11 ..."
    rm -rf "$venv"
    log=$("$python" -m venv "$venv" 2>&1) ||
        die "$python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)." \
            "It said: $(tail -n 1 <<<"$log")"
fi

log=$("$venv/bin/python" -m pip install -q --disable-pip-version-check 'uv>=0.5,<1' 2>&1) ||
    die "cannot reach the package index: no network, or a proxy or mirror is needed (pip's own settings are used)." \
        "pip said: $(grep -i error <<<"$log" | tail -n 1)"

# uv does not read pip's settings: a mirror or a certificate that is set there serves here too.
setting() { "$venv/bin/python" -m pip config get "global.$1" 2>/dev/null; }
mirror=${PIP_INDEX_URL:-$(setting index-url)}
if [ -n "$mirror" ] && [ -z "${UV_DEFAULT_INDEX:-}" ]; then export UV_DEFAULT_INDEX=$mirror; fi
certificate=${PIP_CERT:-$(setting cert)}
if [ -n "$certificate" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE=$certificate; fi

uv=$venv/bin/uv
if [ "${2:-}" = --lock ]; then
    set -e
    { head -n 1 constraints.txt
      { "$uv" pip compile -q --universal --python-version 3.10 --all-extras setup.py --override overrides.txt \
            --constraint pins.txt --no-annotate --no-header
        grep '^opencv-python==' pins.txt; } | LC_ALL=C sort; } > constraints.new
    mv constraints.new constraints.txt
    exit
fi

if [ "${2:-}" = --stack ]; then
    "$uv" pip install --python "$venv/bin/python" --override overrides.txt --requirement "${3:?a requirements file}" \
        pytest pytest-xdist hypothesis --editable . || die "the installation failed; the lines above say why."
    exit
fi

size="about 3 GB to fetch, most of it PyTorch's CUDA libraries"
if [ "${UV_TORCH_BACKEND:-}" = cpu ]; then size='PyTorch without CUDA'; fi
echo "Installing the pinned stack into $venv ($size; no compiler is needed) ..."
"$uv" pip install --python "$venv/bin/python" --constraint constraints.txt --override overrides.txt \
    --editable '.[mmdet,backbones,fast-eval,explain,deploy,docs,dev]' || {
    if ! tried "$venv/bin/python"; then
        die "the installation failed; the lines above say why." \
            "$("$venv/bin/python" --version) has not been tried: remove $venv, and say make PYTHON=python3.13 ..."
    fi
    die "the installation failed; the lines above say why." \
        "Check the network and the free disk space (7 GB), then run make again."
}

"$venv/bin/python" tools/serve_mmcv_ops.py || die "mmcv's operators cannot be served; the lines above say why."
