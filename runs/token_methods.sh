#!/usr/bin/env bash
# Token-level methods, each alone and before half of the groups of the tokens it keeps. Nothing is
# trained. Measured on two CPU cores; the time was not noted. The line was put together from the
# settings that the table names.
# usage: runs/token_methods.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/token_methods}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

# one budget for all heads and layers; without --allocation and --sinks each as it was published
# (SnapKV's row was measured before its window stayed)
python eval.py --init_from="$MODEL" --tasks=continuation --methods=dense,select --n_groups=16 \
  --token_relevances=quest,h2o,streaming,snapkv,observed --token_budgets=0.5,0.25 \
  --budgets=1,0.5 --relevances=observed --detokenize --dataset="text:$TEST" --split=all \
  --calibrate="text:$VALID" --calibration=8 --sequences=24 --block_size=640 --dtype=float32 \
  --allocation=global --sinks=4 --results="$OUT"
