#!/usr/bin/env bash
# Query-aware selection on SmolLM2-135M: which tokens of a prompt, and which of their groups, by
# every signal of relevance, and by whole tokens alone. Numbers stay in 16 bits.
# Needs the run of runs/mixture.sh.
# usage: runs/selection.sh [MODEL] [RUN] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
RUN="${2:-out/mixture}"
OUT="${3:-out/selection}"
VALID="${4:-wikitext2.valid.txt}"
TEST="${5:-wikitext2.test.txt}"

# the paper's predictor, on the same mixture
python train.py --stage=select --init_from="$MODEL" --detokenize --block_size=8192 --n_groups=8 \
  --dataset="pydocs,pycode,dialogue,markup,shakespeare,text:$VALID" --eval_sequences=8 \
  --kv_tail=4 --observers=16 --predictors=predictor --select_steps=400 --select_batch_size=2 \
  --out_dir="$OUT/run"

groups() {  # groups RUN SIGNALS NAME FLAGS...: tokens and groups under one budget
  python eval.py --out_dir="$1" --tasks=continuation --methods=dense,select \
    --dataset="text:$TEST" --split=all --sequences=48 --block_size=2048 --batch_size=24 \
    --dtype=float32 --kv_bits=16 --kv_budgets=0.5,0.25,0.125,0.0625 --relevances="$2" \
    --results="$OUT/$3" "${@:4}"
}
groups "$RUN" predictor_query,future,observed,uniform,random,oracle groups
groups "$OUT/run" predictor paper
# the last 16 tokens whole, as in tables of before, not 4
groups "$RUN" predictor_query groups_16_whole --query=16

# whole tokens alone
python eval.py --out_dir="$RUN" --tasks=continuation --methods=dense,select \
  --dataset="text:$TEST" --split=all --sequences=48 --block_size=2048 --batch_size=24 \
  --dtype=float32 --token_budgets=0.5,0.25,0.125,0.0625 --budgets=1 \
  --relevances=predictor_query --results="$OUT/tokens"
