#!/usr/bin/env bash
# Rehearses `bench gpu`, and runs the tests, on a CPU with the versions of a GPU machine (bench/machine.txt).
#
#     bench/rehearse.sh DIR [STEP…]
#
# DIR keeps the environment (5 GB, because torch includes CUDA) and the output of each step. The machine's transformers
# is older than VTC supports, and it has no wrapt: both come before its own on Python's path. Steps, by default all:
#   environment  Python 3.12 with those versions; the project installed as on a machine without a network
#   gpu          the rehearsal: must end without a failure
#   faults       the rehearsal with planted faults: each must cost its own number and nothing else
#   tests        the test suite
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(realpath -m "$1")
shift
steps=${*:-environment gpu faults tests}
python=$dir/venv/bin/python
carried="transformers==5.24.0 wrapt==2.5.2"

environment() {
    mkdir -p "$dir"
    "${PYTHON:-python3.12}" -m venv "$dir/venv"
    "$python" -m pip install -q -r bench/machine.txt pytest pytest-xdist hypothesis matplotlib peft pillow typer rich wheel
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .
    "$python" -m pip install -q --no-deps --target "$dir/carried" --upgrade $carried
}

carrying() { # MODULE ARGUMENT…
    PYTHONPATH=$dir/carried "$python" -m "$@"
}

gpu() {
    rm -rf "$dir/gpu"
    carrying bench gpu --rehearse --minutes 30 --out "$dir/gpu"
}

faults() {
    rm -rf "$dir/faults"
    carrying bench gpu --rehearse --plant --minutes 30 --out "$dir/faults"
}

tests() {
    carrying pytest -q -n 2
}

for step in $steps; do
    echo "=== $step"
    "$step"
done
