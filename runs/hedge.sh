#!/usr/bin/env bash
# The hedge, the exponent on relevance: three values, on the test windows and on held-out
# validation windows. Put together after the table; the time was not noted (two CPU cores).
# usage: runs/hedge.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/hedge}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

# the predictor, 400 steps on validation text; a tenth of that text is held out
python train.py --stage=select --init_from="$MODEL" --dataset="text:$VALID" --detokenize \
  --block_size=2048 --n_groups=16 --eval_sequences=8 --predictors=predictor_query --out_dir="$OUT"

for HEDGE in 0.5 0.75 1; do
  # 48 windows of test text (the row "tokens only" comes with each)
  python eval.py --out_dir="$OUT" --tasks=continuation --methods=dense,select \
    --dataset="text:$TEST" --split=all --detokenize --sequences=48 --block_size=2048 \
    --kv_budgets=0.5,0.25,0.125,0.0625 --token_budgets=0.5,0.25,0.125,0.0625 --budgets=1 \
    --relevances=predictor_query --hedge="$HEDGE" --results="$OUT/test-$HEDGE"
  # 12 windows of the held-out tenth of the validation text
  python eval.py --out_dir="$OUT" --tasks=continuation --methods=dense,select \
    --dataset="text:$VALID" --split=val --detokenize --sequences=12 --block_size=2048 \
    --kv_budgets=0.5,0.25,0.125,0.0625 --token_budgets=0.5,0.25,0.125,0.0625 --budgets=1 \
    --relevances=predictor_query --hedge="$HEDGE" --results="$OUT/valid-$HEDGE"
done
