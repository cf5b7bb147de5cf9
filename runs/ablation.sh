#!/usr/bin/env bash
# What each step gives, alone and with the others, on the same windows of three texts: fewer
# numbers under one budget, routed bits, values from keys, refit, keys alone, and a string of bytes.
# C headers are a kind that nothing was trained or calibrated on; of Shakespeare the held-out part
# is read, and the string's basis has not seen it. Signals are those of the run of runs/mixture.sh,
# and where values come from keys those of a run that is trained alike here. With SIGNAL=future, or
# another that needs no training, there is no run; the rows name their signal.
# usage: [SEQUENCES=8] [LENGTH=2048] [CALIBRATION=24] [TEXTS=wikitext,cheaders,shakespeare]
#   [SHARES=0.5,0.22,0.125,0.0625,0.04,0.02] [SIGNAL=future]
#   runs/ablation.sh [MODEL] [RUN] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
RUN="${2:-out/mixture}"
OUT="${3:-out/ablation}"
VALID="${4:-wikitext2.valid.txt}"
TEST="${5:-wikitext2.test.txt}"
SEQUENCES="${SEQUENCES:-8}"      # windows of each text
LENGTH="${LENGTH:-2048}"         # tokens of a window
CALIBRATION="${CALIBRATION:-24}" # windows that bases are calibrated on
TEXTS="${TEXTS:-wikitext,cheaders,shakespeare}"
SHARES="${SHARES:-0.5,0.22,0.125,0.0625,0.04,0.02}"
SIGNAL="${SIGNAL:-}" # empty: the trained one
MIXTURE="pydocs,pycode,dialogue,markup,text:$VALID"

# values from keys: as runs/mixture.sh trains
if [[ -z "$SIGNAL" && ! -e "$OUT/keys" ]]; then
  python train.py --stage=select --init_from="$MODEL" --detokenize --block_size=8192 \
    --n_groups=8 --dataset="$MIXTURE,shakespeare" --eval_sequences=8 --kv_tail=4 --observers=16 \
    --predictors=predictor_query --select_steps=800 --select_batch_size=2 --reconstructor=keys \
    --out_dir="$OUT/keys"
fi

measure() {  # measure NAME FLAGS...
  name="$1"
  shift
  python eval.py --tasks=continuation --dataset="$DATASET" --split="$SPLIT" --batch_size=8 \
    --sequences="$SEQUENCES" --block_size="$LENGTH" --results="$OUT/$TEXT/$name" "$@"
}
based() {  # based NAME FLAGS...: the model as it is, calibrated on texts that are not measured
  measure "$@" --init_from="$MODEL" --detokenize --query=4 --calibrate="$CALIBRATED" \
    --calibration="$CALIBRATION"
}
chosen() {  # chosen NAME RECONSTRUCTOR FLAGS...: a selection under both kinds of budget
  name="$1"
  reconstructor="$2"
  shift 2
  set -- --methods=select --kv_budgets="$SHARES" --kv_byte_budgets="$SHARES" "$@"
  if [[ -n "$SIGNAL" ]]; then
    based "$name" --n_groups=8 --observers=16 --relevances="$SIGNAL" \
      --reconstructor="$reconstructor" "$@"
  elif [[ "$reconstructor" == keys ]]; then
    measure "$name" --out_dir="$OUT/keys" "$@"
  else
    measure "$name" --out_dir="$RUN" "$@"
  fi
}

for TEXT in ${TEXTS//,/ }; do
  SPLIT=all
  CALIBRATED="$MIXTURE,shakespeare"
  case "$TEXT" in
    wikitext) DATASET="text:$TEST" ;;
    shakespeare)
      DATASET=shakespeare
      SPLIT=val
      CALIBRATED="$MIXTURE"
      ;;
    *) DATASET="$TEXT" ;;
  esac
  chosen zeros zero
  chosen refit zero --refit
  chosen keys keys
  chosen keys_refit keys --refit
  based keys_alone --methods=dense,value_groups --n_groups=16 --topk_groups=0 --reconstructor=keys
  BESIDE="$OUT/$TEXT/zeros,$OUT/$TEXT/refit,$OUT/$TEXT/keys,$OUT/$TEXT/keys_refit"
  # its bytes.png has all of them
  based string --methods=routed --kv_byte_budgets="$SHARES" --beside="$BESIDE,$OUT/$TEXT/keys_alone"
done
