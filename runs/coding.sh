#!/usr/bin/env bash
# Routed transform coding beside KVTC's rule on eight texts. Both are calibrated on the same windows
# of a mixture that the measured text is not in (of WikiText-2 it has the validation split), and
# keep the same tokens whole. Then a needle in a prompt that is coded so. Strings are made by the
# CPU, one prompt at a time: most of the time. On an H200 eight texts took 310 to 370 seconds each
# without KVTC's rule, with as many programs beside them.
# usage: [CALIBRATION=24] [SEQUENCES=8] runs/coding.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT] [LONG]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/coding}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"
LONG="${5:-out/instruct/long.jsonl}" # instructions with long inputs: runs/instruct.sh makes it
CALIBRATION="${CALIBRATION:-24}" # windows that bases are calibrated on
SEQUENCES="${SEQUENCES:-8}"      # windows of each text

MIXTURE="text:$VALID,shakespeare,pydocs,pycode,markup,dialogue"

measure() {  # measure NAME METHODS LENGTH MIXTURE FLAGS...
  name="$1"
  methods="$2"
  length="$3"
  mixture="$4"
  shift 4
  python eval.py --init_from="$MODEL" --methods="$methods" --calibrate="$mixture" \
    --calibration="$CALIBRATION" --block_size="$length" --query=4 --results="$OUT/$name" "$@"
}
text() {  # text NAME DATASET SPLIT: one text, calibrated on the others
  mixture="text:$VALID"
  for kind in shakespeare pydocs pycode markup dialogue; do
    if [[ "$kind" != "$2" ]]; then
      mixture="$mixture,$kind"
    fi
  done
  measure "texts/$1" dense,routed,kvtc 2048 "$mixture" --tasks=continuation --detokenize \
    --dataset="$2" --split="$3" --batch_size=4 --sequences="$SEQUENCES" \
    --kv_byte_budgets=0.22,0.125,0.0625,0.04,0.02
}
needle() {  # needle LENGTH QUESTION PROMPTS
  measure "needles/$1_$2" dense,routed,kvtc "$1" "$MIXTURE" --tasks=needle --question="$2" \
    --batch_size=4 --sequences="$3" --kv_byte_budgets=0.04
}

text wikitext "text:$TEST" all
text cheaders cheaders all
text records records all
for kind in shakespeare pydocs pycode markup dialogue; do
  text "$kind" "$kind" val
done
for question in seen unseen; do
  needle 600 "$question" 100
  needle 2048 "$question" 32
done

# variables followed, and instructions with long inputs
measure tasks/tracking dense,routed 384 "$MIXTURE" --tasks=variable_tracking --hops=1 \
  --batch_size=25 --sequences=100 --kv_byte_budgets=0.25,0.125,0.0625
measure tasks/instruct dense,routed 2048 "$MIXTURE" --tasks=instruct --dataset="instruct:$LONG" \
  --batch_size=16 --sequences=200 --answer_tokens=48 --kv_byte_budgets=0.125,0.0625
