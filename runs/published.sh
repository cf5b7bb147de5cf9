#!/usr/bin/env bash
# Rivals as they were published, each with its own allocation, beside this project's signal: what a
# prompt's tokens cost when they are dropped, read by pages, or stored in few bits. Not run yet.
# usage: runs/published.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/published}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

# dense, what drops tokens, what picks pages for every query, and what stores codes
python eval.py --init_from="$MODEL" --tasks=continuation --methods=dense,select,quest,kivi \
  --dataset="text:$TEST" --split=all --detokenize --sequences=48 --block_size=2048 --batch_size=24 \
  --calibrate="text:$VALID" --calibration=4 --relevances=observed \
  --token_relevances=observed,h2o,streaming,snapkv,tova,keydiff,expected_attention_closed,quest \
  --token_budgets=0.5,0.25,0.125 --budgets=1 --n_groups=16 --dtype=float32 --results="$OUT/rivals"

# Quest first, then half of the value groups of what it reads (the sub-token paper, third version)
python eval.py --init_from="$MODEL" --tasks=continuation --methods=dense,quest \
  --dataset="text:$TEST" --split=all --detokenize --sequences=48 --block_size=2048 --batch_size=24 \
  --calibrate="text:$VALID" --calibration=4 --token_budgets=0.5,0.25,0.125 --budgets=0.5 \
  --bases=native,output --groups=4,16 --dtype=float32 --results="$OUT/quest_groups"

# this project's integers at KIVI's bits, every number to the nearest code
python eval.py --init_from="$MODEL" --tasks=continuation --methods=dense,select \
  --dataset="text:$TEST" --split=all --detokenize --sequences=48 --block_size=2048 --batch_size=24 \
  --calibrate="text:$VALID" --calibration=4 --value_basis=native --kv_budgets=1 --kv_bits=4,2 \
  --key_rounding=nearest --dtype=float32 --results="$OUT/integers"
