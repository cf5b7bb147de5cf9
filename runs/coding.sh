#!/usr/bin/env bash
# Routed transform coding beside KVTC's rule, both calibrated on a mixture of six texts, on eight
# texts: three of which nothing was calibrated on, and what was held out of the other five; then a
# needle in a prompt that is coded so. Strings are made by the CPU, one prompt at a time: most of
# the time.
# usage: [CALIBRATION=48] runs/coding.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/coding}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"
CALIBRATION="${CALIBRATION:-48}" # windows that bases are calibrated on
MIXTURE="pydocs,pycode,dialogue,markup,shakespeare,text:$VALID"

measure() {  # measure NAME FLAGS...
  name="$1"
  shift
  python eval.py --init_from="$MODEL" --methods=dense,routed,kvtc --calibrate="$MIXTURE" \
    --calibration="$CALIBRATION" --block_size=2048 --batch_size=16 \
    --results="$OUT/$name" "$@"
}

measure others --tasks=continuation --detokenize --sequences=16 \
  --dataset="text:$TEST,cheaders,records" --split=all --kv_byte_budgets=0.22,0.125,0.0625,0.04,0.02
measure held_out --tasks=continuation --detokenize --sequences=16 \
  --dataset=shakespeare,pydocs,pycode,markup,dialogue --split=val \
  --kv_byte_budgets=0.22,0.125,0.0625,0.04,0.02
for question in seen unseen; do
  measure "needle_$question" --tasks=needle --question=$question --sequences=100 \
    --kv_byte_budgets=0.125,0.0625,0.04
done
