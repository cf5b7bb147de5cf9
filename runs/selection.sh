#!/usr/bin/env bash
# Query-aware selection on SmolLM2-135M: which tokens of a prompt, and which of their groups, by every
# signal of relevance, and by whole tokens alone. Numbers stay in 16 bits.
# Needs the run of runs/mixture.sh.
# usage: runs/selection.sh [RUN] [OUT] [TEST_TEXT]
set -euo pipefail
RUN="${1:-out/mixture}"
OUT="${2:-out/selection}"
TEST="${3:-wikitext2.test.txt}"

# tokens and groups under one budget
python eval.py --out_dir="$RUN" --tasks=continuation --methods=dense,select \
  --dataset="text:$TEST" --split=all --sequences=48 --block_size=2048 --batch_size=24 --query=4 \
  --dtype=float32 --kv_bits=16 --kv_budgets=0.5,0.25,0.125,0.0625 \
  --relevances=predictor_query,predictor,future,observed,uniform,random,oracle \
  --results="$OUT/groups"

# whole tokens alone
python eval.py --out_dir="$RUN" --tasks=continuation --methods=dense,select \
  --dataset="text:$TEST" --split=all --sequences=48 --block_size=2048 --batch_size=24 --query=4 \
  --dtype=float32 --token_budgets=0.5,0.25,0.125,0.0625 --budgets=1 \
  --relevances=predictor_query --results="$OUT/tokens"
