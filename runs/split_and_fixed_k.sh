#!/usr/bin/env bash
# From which layer on, and a fixed K against an adaptive one, in the paper's storage without its
# predictor. Measured on two CPU cores; the time was not noted.
# usage: runs/split_and_fixed_k.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/split_and_fixed_k}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

# adaptive: as many groups of a token as its relevance asks for
python eval.py --init_from="$MODEL" --tasks=continuation --methods=dense,select \
  --mask_scope=shared --value_basis=native --n_groups=4 --prefill=routed --sinks=0 --hedge=1 \
  --relevances=observed --splits=22,24 --budgets=0.25,0.5,0.75 --detokenize \
  --dataset="text:$TEST" --split=all --calibrate="text:$VALID" --calibration=8 --sequences=24 \
  --block_size=640 --dtype=float32 --results="$OUT/adaptive"

# fixed: K = 3, 2 or 1 of 4 groups of every token
python eval.py --init_from="$MODEL" --tasks=continuation --methods=dense,select \
  --mask_scope=shared --value_basis=native --n_groups=4 --prefill=routed --sinks=0 --hedge=1 \
  --relevances=observed --splits=22,24 --budgets=0.25,0.5,0.75 --fixed_k --detokenize \
  --dataset="text:$TEST" --split=all --calibrate="text:$VALID" --calibration=8 --sequences=24 \
  --block_size=640 --dtype=float32 --results="$OUT/fixed_k"
