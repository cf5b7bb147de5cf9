#!/usr/bin/env bash
# The hedge, the exponent on relevance, on what was held out of texts that the predictor was trained
# on: tokens and groups in 16 bits, and routed bits.
# Needs the run of runs/mixture.sh, and its validation text.
# usage: runs/hedge.sh [RUN] [OUT] [VALID_TEXT]
set -euo pipefail
RUN="${1:-out/mixture}"
OUT="${2:-out/hedge}"
VALID="${3:-wikitext2.valid.txt}"

for HEDGE in 0.5 0.75 1; do
  python eval.py --out_dir="$RUN" --tasks=continuation --methods=dense,select \
    --dataset="text:$VALID,pycode,markup" --split=val --sequences=16 --block_size=2048 \
    --batch_size=16 --kv_budgets=0.25,0.125,0.0625 --kv_bits=16 \
    --kv_byte_budgets=0.125,0.0625 --relevances=predictor_query --hedge="$HEDGE" \
    --results="$OUT/$HEDGE"
done
