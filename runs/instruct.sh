#!/usr/bin/env bash
# Instructions: ROUGE-L of a model as it is, then of mixSGA, GQA and CLA at 50 % and 35 % of keys
# and values, trained on instructions for equal steps, also without what was added to the paper,
# without the consistency loss and with a random router; and of a prompt in 25, 12.5 and 6.25 % of
# its bytes.
# SmolLM2 has three KV heads (groups of 1 and 3), the model pretrained here eight (1, 2 and 4).
# TRAIN, TEST: JSONL of instruction, input, output, of tasks that are not in both. On an H200 what
# the table has took 4,395 seconds.
# usage: [STEPS="50 200"] [SEEDS=2] [MORE=FLAGS] [PARTS="base smollm2 eight long"] [SHAPE=FLAGS] \
#   [PRETRAIN_STEPS=3000] [CONTINUE_STEPS=200] [SELECT_STEPS=400] [LONGEST=2048] [ANSWERS=400] \
#   runs/instruct.sh [TRAIN] [TEST] [MODEL] [OUT]
set -euo pipefail
TRAIN="${1:-train.jsonl}"
TEST="${2:-test.jsonl}"
MODEL="${3:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${4:-out/instruct}"
STEPS="${STEPS:-50 200}"
SEEDS="${SEEDS:-2}"
MORE="${MORE:-}" # flags of every command, such as --device=cpu
PARTS="${PARTS:-base smollm2 eight long}"

for file in "$TRAIN" "$TEST"; do
  if [[ ! -e "$file" ]]; then
    echo "runs/instruct.sh: $file: there is no such file; give JSONL of instructions" >&2
    exit 2
  fi
done
mkdir -p "$OUT"

rows() {  # rows NAME FLAGS...: every row after so many steps, with as many seeds
  name="$1"
  shift
  for steps in $STEPS; do
    python eval.py --tasks=mixsga --dataset="instruct:$TRAIN" --answered="$TEST" --h2o= \
      --seeds="$SEEDS" --steps="$steps" --lr=3e-4 --results="$OUT/$name-$steps" "$@" $MORE
  done
}

# the model as it is
if [[ " $PARTS " == *" base "* ]]; then
  python eval.py --init_from="$MODEL" --tasks=instruct --dataset="instruct:$TEST" \
    --methods=dense --block_size=1024 --batch_size=32 --sequences=1000 --answer_tokens=48 \
    --results="$OUT/base" $MORE
fi

# three KV heads: shares 1:3 of groups of 1 and 3 keep 50 %, 1:39 keep 35 %
if [[ " $PARTS " == *" smollm2 "* ]]; then
  rows smollm2 --init_from="$MODEL" --mixes=1-3@1:3,1-3@1:39 --block_size=512 --batch_size=16 \
    --sequences=64 --answer_tokens=48
fi

# eight KV heads, bytes: pretrained on text, then all of it on the instructions
if [[ " $PARTS " == *" eight "* ]]; then
  EIGHT="--n_layer=10 --n_embd=512 --n_head=8 --n_kv_head=8 --head_dim=64 --n_inner=1376"
  python train.py --stage=pretrain ${SHAPE:-$EIGHT} --block_size=1024 \
    --dataset=pydocs,dialogue,markup --pretrain_steps="${PRETRAIN_STEPS:-3000}" \
    --pretrain_batch_size=32 --pretrain_lr=1e-3 --out_dir="$OUT/eight" $MORE
  python train.py --stage=continue --kv=dense --init_from="$OUT/eight/pretrain" \
    --dataset="instruct:$TRAIN" --adapt_steps="${CONTINUE_STEPS:-200}" --adapt_batch_size=32 \
    --adapt_lr=5e-4 --out_dir="$OUT/eight-tuned" $MORE
  rows eight --out_dir="$OUT/eight-tuned/dense-s0" --mixes=3:1:6,1:1:8 --batch_size=16 \
    --sequences=64 --answer_tokens=200
fi

# long inputs, of the file that nothing of this part was trained on: selection by predictors
if [[ " $PARTS " == *" long "* ]]; then
  python -c "
import json, sys
for line in open(sys.argv[1], encoding='utf-8'):
    row = json.loads(line)
    if len((row['instruction'] + ' ' + row.get('input', '')).split()) >= 150:
        print(line, end='')
" "$TRAIN" > "$OUT/long.jsonl"
  for ((seed = 0; seed < SEEDS; seed++)); do
    python train.py --stage=select --init_from="$MODEL" --block_size="${LONGEST:-2048}" \
      --n_groups=8 --dataset=pydocs,pycode,dialogue,markup --eval_sequences=8 \
      --predictors=predictor_query --select_steps="${SELECT_STEPS:-400}" --select_batch_size=8 \
      --seed="$seed" --out_dir="$OUT/select-$seed" $MORE
    python eval.py --out_dir="$OUT/select-$seed" --tasks=instruct \
      --dataset="instruct:$OUT/long.jsonl" --methods=dense,select \
      --kv_byte_budgets=0.25,0.125,0.0625 --sequences="${ANSWERS:-400}" --batch_size=32 \
      --answer_tokens=48 --seed="$seed" --results="$OUT/long-$seed" $MORE
  done
fi
