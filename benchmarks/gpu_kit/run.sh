#!/usr/bin/env bash
# What a CUDA machine proves of this library, without network: `run.sh STAGE [OUT]`. METHOD.md says how.
#
# STAGE is tests, speed, learn, rewards, estimates, or all of them. Results are in OUT, by default outputs/gpu_kit.
# Variables: PYTHON, the Python that has PyTorch; KIT_SECONDS, within which all of it ends; REHEARSE=1, which takes
# tiny sizes and a CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."

stage=${1:?usage: run.sh tests|speed|learn|rewards|estimates|all [OUT]}
out=${2:-outputs/gpu_kit}
python=${PYTHON:-python3}
wheels=benchmarks/gpu_kit/wheels
# dill, by which datasets hashes, pickles modules by their content unless they are in a folder of this name.
site=${KIT_SITE:-${TMPDIR:-/tmp}/trl-udm-gpu-kit}/site-packages

# Beside PyTorch, which stays as it is: what the folder of wheels has goes before what the machine has.
if [ -e "$wheels/requirements.txt" ] && [ ! -e "$site/done" ]; then
    rm -rf "$site"
    "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" \
        --requirement "$wheels/requirements.txt" --target "$site"
    touch "$site/done"
fi

export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
status=0
"$python" benchmarks/gpu_kit/parts.py "$stage" "$out" || status=$?
"$python" benchmarks/gpu_kit/report.py "$out"
exit "$status"
