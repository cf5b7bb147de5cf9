#!/usr/bin/env bash
# Zero-shot choices: dense, and a prompt in 25, 12.5 and 6.25 % of its bytes, the question
# compressed with its context, and apart from it. ITEMS: JSONL files as the data sets ship them, a
# list: HellaSwag, PIQA, WinoGrande, ARC, OpenBookQA, BoolQ, COPA, LAMBADA. The value is acc_norm;
# what is printed at the end is acc, too. Measuring took 1,811 seconds on an H200.
# Shares of bytes below those of the newest four tokens and the sinks, all of them whole, cannot be
# had of a short prompt: the share that is held is printed, too.
# APART: the files of ITEMS whose items have a context to compress without their question
# usage: [MORE=FLAGS] [N=500] [APART=FILES] [LONGEST=2048] [SELECT_STEPS=400] \
#   runs/choices.sh [ITEMS] [MODEL] [OUT] [RUN]
#   RUN: of train.py --stage=select, such as that of runs/mixture.sh; trained here where not given
set -euo pipefail
ALL="hellaswag.jsonl,piqa.jsonl,winogrande.jsonl,arc_easy.jsonl,arc_challenge.jsonl"
ITEMS="${1:-$ALL,openbookqa.jsonl,boolq.jsonl,copa.jsonl,lambada.jsonl}"
MODEL="${2:-SmolLM2-135M-Instruct.Q4_1.gguf}"
APART="${APART:-${1:-hellaswag.jsonl,boolq.jsonl,lambada.jsonl}}"
OUT="${3:-out/choices}"
RUN="${4:-}"
MORE="${MORE:-}" # flags of every command, such as --device=cpu
N="${N:-500}"    # items of each file

items="$ITEMS,$APART"
for file in ${items//,/ }; do
  if [[ ! -e "$file" ]]; then
    echo "runs/choices.sh: $file: there is no such file; give files that are there" >&2
    exit 2
  fi
done

if [[ -z "$RUN" ]]; then
  RUN="$OUT/run"
  python train.py --stage=select --init_from="$MODEL" --block_size="${LONGEST:-2048}" --n_groups=8 \
    --dataset=pydocs,pycode,dialogue,markup --eval_sequences=8 --predictors=predictor_query \
    --select_steps="${SELECT_STEPS:-400}" --select_batch_size=8 --out_dir="$RUN" $MORE
fi

for question in seen unseen; do
  items="$ITEMS"
  if [[ $question == unseen ]]; then
    items="$APART"
  fi
  python eval.py --out_dir="$RUN" --tasks=zero_shot --items="$items" --question=$question \
    --methods=dense,select --kv_byte_budgets=0.25,0.125,0.0625 --query=4 --sequences="$N" \
    --batch_size=128 --results="$OUT/$question" $MORE > /dev/null
done

python -c "
import json, sys
for question in ('seen', 'unseen'):
    for r in json.load(open(f'{sys.argv[1]}/{question}/results.json')):
        a = r['accuracies']
        print(f'{question:7} {r[\"task\"]:16} {r[\"method\"]:7} {r[\"of_dense\"]:7.1%} of dense  '
              f'acc {a[\"total\"]:.3f}  acc_norm {a[\"characters\"]:.3f}  '
              f'nats of the right answer {r[\"right_nats\"]:.3f}  n {r[\"n\"]}')
" "$OUT"
