#!/usr/bin/env bash
# Supervised fine-tuning on whole conversations: every assistant turn of an episode in one pass.
#
#   run_alfworld_sft_multiturn.sh NGPU OUTDIR DATADIR [key=value ...]
#
# The same settings as run_alfworld_sft_single.sh, with data.multiturn.enable=true.
set -euo pipefail
if [ "$#" -lt 3 ]; then
    echo "usage: $(basename "$0") NGPU OUTDIR DATADIR [key=value ...]" >&2
    exit 2
fi
MULTITURN=true exec bash "$(dirname "$0")/run_alfworld_sft_single.sh" "$@"
