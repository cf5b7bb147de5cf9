#!/usr/bin/env bash
# Value groups of SmolLM2-135M before any training: three bases, three numbers of groups.
# This and the row of trained_basis.sh were measured in 254 seconds on an H200.
# usage: runs/value_groups.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/value_groups}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

# the loss of the 128 tokens after a compressed context, 48 windows of 2,048 tokens
python eval.py --init_from="$MODEL" --tasks=continuation --methods=dense,value_groups \
  --bases=native,pca,output --groups=4,8,16 --detokenize --dataset="text:$TEST" --split=all \
  --calibrate="text:$VALID" --sequences=48 --calibration=24 --batch_size=24 --dtype=float32 \
  --results="$OUT"
