#!/usr/bin/env bash
# Collect ALFWorld episodes for supervised fine-tuning.
#
#   run_alfworld_sft_collection.sh [engine] [key=value ...]
#
# `engine` is who plays: expert (default), hf (with policy.model=DIR) or scripted. Everything after
# it goes to `verl-sft collect` as it is and wins over the variables below, which are defaults: set
# them in the environment to change them.
#
#   ALFWORLD_DATA         folder that holds json_2.1.1/
#   COLLECT_SFT           0 or false: do nothing
#   SFT_SEED              seed of tasks, policy and split
#   SFT_REQUIRE_SUCCESS   keep only episodes that solved their task
#   PROMPT_TEMPLATE       default | add_wm1 | add_wm2
#   NUM_EPISODES          empty: each task once
#   MAX_STEPS             steps per episode
#   NUM_WORKERS           empty: one per core
#   SFT_OUTPUT_DIR        parent of sft_data_YYYYMMDD_HHMMSS/
#   PYTHON                the interpreter
set -euo pipefail

: "${COLLECT_SFT:=true}" "${SFT_SEED:=0}" "${SFT_REQUIRE_SUCCESS:=true}"
: "${PROMPT_TEMPLATE:=default}" "${NUM_EPISODES:=}" "${MAX_STEPS:=50}" "${NUM_WORKERS:=}"
: "${SFT_OUTPUT_DIR:=.}"

case "${COLLECT_SFT,,}" in
  0 | false | no | off)
    echo "COLLECT_SFT=${COLLECT_SFT}: nothing to do" >&2
    exit 0
    ;;
esac

engine=expert
if [[ $# -gt 0 && $1 != *=* && $1 != -* ]]; then
  engine=$1
  shift
fi

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x $root/.venv/bin/python ]]; then
    PYTHON=$root/.venv/bin/python
  fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

defaults=(
  "rollout.seed=$SFT_SEED"
  "filter.require_success=$SFT_REQUIRE_SUCCESS"
  "prompt.template=$PROMPT_TEMPLATE"
  "rollout.max_steps=$MAX_STEPS"
  "output.dir=$SFT_OUTPUT_DIR"
)
[[ -z $NUM_EPISODES ]] || defaults+=("rollout.num_episodes=$NUM_EPISODES")
[[ -z $NUM_WORKERS ]] || defaults+=("rollout.num_workers=$NUM_WORKERS")

exec "$PYTHON" -m verl_sft.cli collect env=alfworld "policy=$engine" "${defaults[@]}" "$@"
