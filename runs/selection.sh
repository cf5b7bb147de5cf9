#!/usr/bin/env bash
# Query-aware selection on SmolLM2-135M: which tokens of a prompt, and which of their groups.
# On an H200: training 109 s, the measurement of all signals at --hedge=0.5 94 s.
# The last command was put together after the table.
# usage: runs/selection.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/select}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

# the trained signals of relevance, on validation text
python train.py --stage=select --init_from="$MODEL" --dataset="text:$VALID" --detokenize \
  --block_size=2048 --n_groups=16 --eval_sequences=8 \
  --predictors=predictor,expected_attention,predictor_query --out_dir="$OUT"

# tokens and groups under one budget, every signal, at the hedge the table names for these rows
python eval.py --out_dir="$OUT" --tasks=continuation --methods=dense,select \
  --dataset="text:$TEST" --split=all --detokenize --sequences=48 --block_size=2048 \
  --batch_size=8 --dtype=float32 --kv_budgets=0.5,0.25,0.125,0.0625 --hedge=0.5 \
  --relevances=predictor_query,predictor,future,observed,uniform,random,oracle \
  --results="$OUT/hedge-0.5"

# predictor_query at the default hedge, 0.75, and the same relevance for whole tokens only
python eval.py --out_dir="$OUT" --tasks=continuation --methods=dense,select \
  --dataset="text:$TEST" --split=all --detokenize --sequences=48 --block_size=2048 \
  --batch_size=8 --dtype=float32 --kv_budgets=0.5,0.25,0.125,0.0625 \
  --token_budgets=0.5,0.25,0.125,0.0625 --budgets=1 --relevances=predictor_query \
  --results="$OUT/hedge-0.75"
