#!/usr/bin/env bash
# Loss against bytes on SmolLM2-135M: uniform bits, kept tokens and groups, routed bits.
# Measured on one H100; the time was not noted.
# The last two commands (float32, needle) were put together after the table.
# usage: runs/bits.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/bits}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

# the predictor of relevance, S = 8
python train.py --stage=select --init_from="$MODEL" --dataset="text:$VALID" --detokenize \
  --block_size=2048 --n_groups=8 --eval_sequences=8 --predictors=predictor_query --out_dir="$OUT"

# uniform bits of everything (KIVI), native basis, every number to the nearest code
python eval.py --init_from="$MODEL" --tasks=continuation --dataset="text:$TEST" --split=all \
  --detokenize --sequences=48 --block_size=2048 --batch_size=8 --calibrate="text:$VALID" \
  --calibration=4 --methods=dense,select --value_basis=native --kv_budgets=1 \
  --kv_bits=4,3,4:2,3:2,2:2 --key_rounding=nearest --results="$OUT/kivi"

# the same, keys rounded for the queries that will read them
python eval.py --init_from="$MODEL" --tasks=continuation --dataset="text:$TEST" --split=all \
  --detokenize --sequences=48 --block_size=2048 --batch_size=8 --calibrate="text:$VALID" \
  --calibration=4 --methods=dense,select --value_basis=native --kv_budgets=1 \
  --kv_bits=4,3,4:2,3:2,2:2 --results="$OUT/uniform"

# routed bits, 4 bits of what is kept, 16 bits of what is kept; draws docs/bytes.png's picture
python eval.py --out_dir="$OUT" --tasks=continuation --dataset="text:$TEST" --split=all \
  --detokenize --sequences=48 --block_size=2048 --batch_size=8 --methods=dense,select \
  --kv_byte_budgets=0.28,0.22,0.19,0.15,0.125,0.1,0.0625,0.04 \
  --kv_budgets=0.75,0.5,0.4,0.28,0.22,0.19,0.125,0.0625 \
  --token_budgets=0.5,0.28,0.22,0.19,0.125,0.0625 --budgets=1 --kv_bits=16,4 \
  --beside="$OUT/kivi,$OUT/uniform" --results="$OUT/routed"

# the row of routed bits computed in float32
python eval.py --out_dir="$OUT" --tasks=continuation --dataset="text:$TEST" --split=all \
  --detokenize --sequences=48 --block_size=2048 --batch_size=8 --methods=dense,select \
  --kv_byte_budgets=0.28,0.22,0.19,0.15,0.125,0.1,0.0625,0.04 --dtype=float32 \
  --results="$OUT/routed-float32"

# one needle in 2,048 tokens at 12.5 and 6.25 % of the bytes, 100 prompts
python eval.py --out_dir="$OUT" --tasks=needle --methods=dense,select --sequences=100 \
  --block_size=2048 --kv_byte_budgets=0.125,0.0625 --results="$OUT/needle"
