#!/usr/bin/env bash
# The two maps of the value basis trained, nothing else: SmolLM2-135M, 8 of 16 groups.
# Training takes 319 s on an H200 that six other runs share.
# usage: runs/trained_basis.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/basis}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

# fits the maps to what the same model predicts with whole values
python train.py --stage=adapt --init_from="$MODEL" --adapter=none --n_groups=16 --topk_groups=8 \
  --kv_tail=16 --learn_basis --objective=distill --detokenize --dataset="text:$VALID" \
  --adapt_steps=700 --adapt_lr=3e-3 --adapt_batch_size=8 --block_size=1024 --eval_sequences=16 \
  --out_dir="$OUT"

# the loss of the 128 tokens after a compressed context, the windows of runs/value_groups.sh; the
# context processed with whole values, and as training reads it, each token over routed ones
for PREFILL in exact routed; do
  python eval.py --out_dir="$OUT" --tasks=continuation --dataset="text:$TEST" --split=all \
    --detokenize --sequences=48 --block_size=2048 --batch_size=24 --dtype=float32 \
    --prefill=$PREFILL --results="$OUT/$PREFILL"
done
