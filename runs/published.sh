#!/usr/bin/env bash
# Rivals as they were published, each with its own allocation, beside this project's signal: what a
# prompt's tokens cost when they are dropped, read by pages, or stored in few bits.
# usage: runs/published.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/published}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

measure() {  # measure NAME FLAGS...
  name="$1"
  shift
  python eval.py --init_from="$MODEL" --tasks=continuation --dataset="text:$TEST" --split=all \
    --detokenize --sequences=48 --block_size=2048 --batch_size=24 --calibrate="text:$VALID" \
    --calibration=4 --dtype=float32 --results="$OUT/$name" "$@"
}
DROPPING=h2o,streaming,snapkv,tova,keydiff,expected_attention_closed,quest

# what drops tokens, what picks pages for every query, and what stores codes
measure rivals --methods=dense,select,quest,kivi --relevances=observed \
  --token_relevances=observed,$DROPPING --token_budgets=0.5,0.25,0.125 --budgets=1 --n_groups=16

# what codes a prompt in a share of its bytes, beside this project's two ways to do so; principal
# components of 5,760 numbers a token want more calibration
measure coded --methods=dense,select,routed,kvtc,rdkv --kv_byte_budgets=0.22,0.125,0.0625,0.04 \
  --calibration=96

# the same methods under one budget for all heads and layers
measure global --methods=dense,select --relevances=observed --token_relevances=observed,$DROPPING \
  --token_budgets=0.25 --budgets=1 --n_groups=16 --allocation=global --sinks=4

# each before half of the value groups of the tokens that it keeps
measure groups --methods=dense,select --relevances=observed --token_relevances=observed,$DROPPING \
  --token_budgets=0.5,0.25 --budgets=0.5 --n_groups=16

# Quest first, then half of the value groups of what it reads (the sub-token paper, third version)
measure quest_groups --methods=dense,quest --token_budgets=0.5,0.25,0.125 --budgets=0.5 \
  --bases=native,output --groups=4,16

# this project's integers at KIVI's bits, every number to the nearest code
measure integers --methods=dense,select --value_basis=native --kv_budgets=1 --kv_bits=4,2 \
  --key_rounding=nearest
