#!/usr/bin/env bash
# Plays `bench gpu`, and runs the tests, on a CPU with the versions of a GPU machine (bench/machine.txt).
#
#     bench/rehearse.sh DIR [STEP…]
#
# DIR keeps the environment (5 GB, for torch comes with CUDA) and what each step printed. Steps, by default all:
#   environment  Python 3.12 with those versions; the project installed as on a machine without a network
#   gpu          the rehearsal: must end without a failure
#   faults       the rehearsal with faults planted: must lose what they befall and nothing else
#   tests        the test suite
#   carried      a newer transformers put before the other, as one carries it: rehearsal, tests of models
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(realpath -m "$1")
shift
steps=${*:-environment gpu faults tests carried}
python=$dir/venv/bin/python
carried=transformers==5.23.0

environment() {
    mkdir -p "$dir"
    "${PYTHON:-python3.12}" -m venv "$dir/venv"
    "$python" -m pip install -q -r bench/machine.txt pytest pytest-xdist hypothesis matplotlib peft pillow typer rich wheel
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .
    "$python" -m pip install -q --no-deps --target "$dir/carried" --upgrade "$carried"
}

gpu() { # FOLDER
    rm -rf "$dir/$1"
    "$python" -m bench gpu --rehearse --minutes 30 --out "$dir/$1"
}

faults() {
    rm -rf "$dir/faults"
    "$python" -m bench gpu --rehearse --plant --minutes 30 --out "$dir/faults"
}

tests() {
    "$python" -m pytest -q -n 2
}

carried() {
    export PYTHONPATH=$dir/carried
    gpu gpu-carried
    "$python" -m pytest -q -n 2 tests/test_{llava,api,models,dropin,tiny,prune,methods_model,bench,bench_gpu}.py
}

for step in $steps; do
    echo "=== $step"
    if [ "$step" = gpu ]; then gpu gpu; else "$step"; fi
done
