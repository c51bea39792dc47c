#!/usr/bin/env bash
# Supervised fine-tuning on single steps: one prompt, one answer.
#
#   run_alfworld_sft_single.sh NGPU OUTDIR DATADIR [key=value ...]
#
# DATADIR is an sft_data_* directory. Later overrides win, e.g. model.partial_pretrain=/my/model.
# Without GPUs, NGPU gloo ranks train on the CPU.
set -euo pipefail
MULTITURN=${MULTITURN:-false}

if [ "$#" -lt 3 ]; then
    echo "usage: $(basename "$0") NGPU OUTDIR DATADIR [key=value ...]" >&2
    exit 2
fi
ngpu=$1 outdir=$2 datadir=$3
shift 3
case $ngpu in
    '' | *[!0-9]* | 0 | ?????*) echo "NGPU=$ngpu: must be a positive number" >&2; exit 2 ;;
esac
if [ ! -e "$datadir" ]; then
    echo "DATADIR=$datadir: no such directory; make one with verl-sft collect" >&2
    exit 2
fi

gpus=0
if command -v nvidia-smi > /dev/null 2>&1; then
    gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU' || true)
fi
if [ "$gpus" -gt 0 ] && [ "$ngpu" -gt "$gpus" ]; then
    echo "NGPU=$ngpu: this machine has $gpus GPUs" >&2
    exit 2
fi
if [ "$gpus" -eq 0 ]; then
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ngpu ? cores / ngpu : 1))}
    echo "no GPU here: $ngpu gloo ranks on the CPU, $OMP_NUM_THREADS threads each"
fi

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "$root/.venv/bin/python" ]; then
        PYTHON=$root/.venv/bin/python
    fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

exec "$PYTHON" -m verl_sft.trainer.launch "$ngpu" \
    data.train_files="$datadir" \
    data.multiturn.enable="$MULTITURN" \
    data.train_batch_size=128 \
    data.micro_batch_size_per_gpu=2 \
    data.max_length=2048 \
    model.partial_pretrain=Qwen/Qwen2.5-1.5B-Instruct \
    model.lora_rank=32 \
    model.lora_alpha=16 \
    model.target_modules=all-linear \
    model.enable_gradient_checkpointing=true \
    optim.lr=1e-4 \
    trainer.total_epochs=3 \
    trainer.default_local_dir="$outdir" \
    "$@"
