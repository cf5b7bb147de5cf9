#!/usr/bin/env bash
# Tasks after selection: needles in a long text, a second needle, variable tracking.
# Needs the run of runs/selection.sh. The lines were put together from the settings that the table
# names; the time was not noted.
# usage: runs/needle.sh [RUN] [OUT]
set -euo pipefail
RUN="${1:-out/select}"
OUT="${2:-out/needle}"

# one needle in 2,048 tokens, 100 prompts
python eval.py --out_dir="$RUN" --tasks=needle --methods=dense,select \
  --relevances=predictor_query --hedge=0.5 --kv_budgets=0.375,0.25,0.0625 --sequences=100 \
  --block_size=2048 --results="$OUT/needle"

# a needle among 3 distractors, and a second needle asked of the same cache, 60 prompts
python eval.py --out_dir="$RUN" --tasks=needle,needle_reuse --distractors=3 \
  --methods=dense,select --relevances=predictor_query --hedge=0.5 --kv_budgets=0.25,0.0625 \
  --sequences=60 --block_size=2048 --results="$OUT/distractors"

# variable tracking, one hop, 384 tokens, 60 prompts
python eval.py --out_dir="$RUN" --tasks=variable_tracking --hops=1 --methods=dense,select \
  --relevances=predictor_query --hedge=0.5 --kv_budgets=0.375 --sequences=60 --block_size=384 \
  --results="$OUT/variable_tracking"
