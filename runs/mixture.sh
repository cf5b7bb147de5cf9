#!/usr/bin/env bash
# Predictors of relevance trained on a mixture of texts, in windows of many lengths (512 to 8,192
# tokens) that go on, repeat their own passages or ask for one (--recall), and what they lose on
# texts of that kind and of others: C headers and records are kinds that no predictor was trained
# on. The last 16 tokens are observed, the last 4 stay whole. Other scripts measure the run that
# this makes.
# usage: runs/mixture.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/mixture}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

python train.py --stage=select --init_from="$MODEL" --detokenize --block_size=8192 --n_groups=8 \
  --dataset="pydocs,pycode,dialogue,markup,shakespeare,text:$VALID" --eval_sequences=8 \
  --kv_tail=4 --observers=16 --predictors=predictor_query --select_steps=800 \
  --select_batch_size=2 --out_dir="$OUT"

# texts of which nothing was trained on
python eval.py --out_dir="$OUT" --tasks=continuation --methods=dense,select --sequences=16 \
  --dataset="text:$TEST,cheaders,records" --split=all --block_size=2048 --batch_size=16 \
  --kv_byte_budgets=0.22,0.125,0.0625,0.04 --results="$OUT/others"

# what was held out of the texts that were trained on
python eval.py --out_dir="$OUT" --tasks=continuation --methods=dense,select --sequences=16 \
  --dataset=shakespeare,pydocs,pycode,markup,dialogue --split=val --block_size=2048 \
  --batch_size=16 \
  --kv_byte_budgets=0.22,0.125,0.0625,0.04 --results="$OUT/held_out"
