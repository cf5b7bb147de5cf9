#!/usr/bin/env bash
# Loss and divergence against bytes on SmolLM2-135M: uniform bits, kept tokens and groups, routed
# bits. Needs the run of runs/mixture.sh, and its validation text for the bases of uniform bits.
# The picture of the last command shows what codes a prompt, too, where runs/coding.sh and
# runs/published.sh have been run before.
# usage: runs/bits.sh [MODEL] [RUN] [OUT] [VALID_TEXT] [TEST_TEXT] [CODING] [PUBLISHED]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
RUN="${2:-out/mixture}"
OUT="${3:-out/bits}"
VALID="${4:-wikitext2.valid.txt}"
TEST="${5:-wikitext2.test.txt}"
CODING="${6:-out/coding}"
PUBLISHED="${7:-out/published}"

# uniform bits of everything, native basis: every number to the nearest code, and keys rounded for
# the queries that will read them
for ROUNDING in nearest queries; do
  python eval.py --init_from="$MODEL" --tasks=continuation --dataset="text:$TEST" --split=all \
    --detokenize --sequences=48 --block_size=2048 --batch_size=48 --query=4 \
    --calibrate="text:$VALID" --calibration=4 --methods=dense,select --value_basis=native \
    --kv_budgets=1 --kv_bits=4,3,3:2,2:2 --key_rounding=$ROUNDING --results="$OUT/$ROUNDING"
done

# tokens and groups, and tokens alone, in 16 and in 4 bits
for KIND in kv_budgets token_budgets; do
  python eval.py --out_dir="$RUN" --tasks=continuation --dataset="text:$TEST" --split=all \
    --sequences=48 --block_size=2048 --batch_size=48 --methods=dense,select \
    --relevances=predictor_query --$KIND=0.5,0.22,0.125,0.0625 --budgets=1 --kv_bits=16,4 \
    --results="$OUT/$KIND"
done

BESIDE="$OUT/nearest,$OUT/queries,$OUT/kv_budgets,$OUT/token_budgets"
for FOLDER in "$CODING/texts/wikitext" "$PUBLISHED/coded"; do
  if [[ -e "$FOLDER/results.json" ]]; then
    BESIDE="$BESIDE,$FOLDER"
  fi
done

# routed bits by bytes, in bfloat16 and in float32, drawn with all of these
for DTYPE in float32 bfloat16; do
  python eval.py --out_dir="$RUN" --tasks=continuation --dataset="text:$TEST" --split=all \
    --sequences=48 --block_size=2048 --batch_size=48 --methods=dense,select \
    --relevances=predictor_query --kv_byte_budgets=0.28,0.22,0.19,0.15,0.125,0.1,0.0625,0.04,0.02 \
    --beside="$BESIDE" --dtype=$DTYPE --results="$OUT/routed-$DTYPE"
done
