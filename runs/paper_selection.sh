#!/usr/bin/env bash
# The paper's own selection on SmolLM2-135M: native basis, S = 4, one mask for all layers from a
# layer on, routed prefill; with its predictor from layer 22 on, and without one from layers 22 and
# 24 on, where K adapts to the token and where it is fixed.
# usage: runs/paper_selection.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/paper_selection}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

# the paper's predictor, 300 steps on validation text
python train.py --stage=select --init_from="$MODEL" --dataset="text:$VALID" --detokenize \
  --block_size=2048 --eval_sequences=8 --predictors=predictor --relevance=predictor \
  --mask_scope=shared --value_basis=native --n_groups=4 --prefill=routed --sinks=0 \
  --kv_layers=from:22 --kv_tail=16 --select_steps=300 --out_dir="$OUT"

# continuation on test text
python eval.py --out_dir="$OUT" --tasks=continuation --methods=dense,select \
  --dataset="text:$TEST" --split=all --sequences=48 --block_size=2048 --batch_size=24 \
  --dtype=float32 --relevances=predictor --budgets=0.75,0.5,0.25 --results="$OUT/continuation"

# one needle in 2,048 tokens
python eval.py --out_dir="$OUT" --tasks=needle --methods=dense,select --relevances=predictor \
  --budgets=0.75,0.5,0.25 --sequences=100 --block_size=2048 --batch_size=25 \
  --results="$OUT/needle"

# as many groups of a token as its observed relevance asks for, or K = 3, 2 or 1 of every token
for K in adaptive fixed; do
  python eval.py --init_from="$MODEL" --tasks=continuation --methods=dense,select \
    --mask_scope=shared --value_basis=native --n_groups=4 --prefill=routed --sinks=0 --hedge=1 \
    --relevances=observed --splits=22,24 --budgets=0.25,0.5,0.75 \
    --fixed_k=$([[ $K == fixed ]] && echo true || echo false) --detokenize \
    --dataset="text:$TEST" --split=all --calibrate="text:$VALID" --calibration=8 --sequences=48 \
    --block_size=2048 --batch_size=24 --dtype=float32 --results="$OUT/$K"
done
