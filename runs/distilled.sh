#!/usr/bin/env bash
# Trained with storage in the loop: what a model predicts from what is stored is fitted to what it
# predicts with everything whole, nothing else. At 75 and 50 % of keys and values: value groups over
# values from keys, whose maps are trained. At 22 to 2 %: the map that reads what is stored, at
# 6.25 % with low-rank adapters on q and o, too, over contexts that the run of runs/mixture.sh
# selects. Beside each the same storage without training, on WikiText-2's test split and on a kind
# of text that nothing was trained on.
# usage: [STEPS=300] [SELECT_STEPS=200] \
#   runs/distilled.sh [MODEL] [RUN] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
RUN="${2:-out/mixture}"
OUT="${3:-out/distilled}"
VALID="${4:-wikitext2.valid.txt}"
TEST="${5:-wikitext2.test.txt}"
STEPS="${STEPS:-300}" # of training value groups, each
SELECT_STEPS="${SELECT_STEPS:-200}" # over selected contexts
MIXTURE="pydocs,pycode,dialogue,markup,shakespeare,text:$VALID"

train() {  # train FOLDER FLAGS...
  out="$1"
  shift
  python train.py --stage=adapt --init_from="$MODEL" --objective=distill --detokenize \
    --dataset="$MIXTURE" --eval_sequences=16 --out_dir="$out" "$@"
}
measure() {  # measure NAME FLAGS...: 128 tokens after a stored context, 16 windows of each text
  name="$1"
  shift
  python eval.py --tasks=continuation --dataset="text:$TEST,cheaders" --split=all --detokenize \
    --sequences=16 --block_size=2048 --batch_size=16 --results="$OUT/results/$name" "$@"
}

# 8 of 16 groups, and keys alone
for K in 8 0; do
  train "$OUT/maps-${K}of16" --adapt_steps="$STEPS" --adapter=none --n_groups=16 \
    --topk_groups=$K --reconstructor=keys --learn_basis --kv_tail=4 --block_size=1024 \
    --adapt_batch_size=8 --adapt_lr=1e-3
  measure "maps-${K}of16" --out_dir="$OUT/maps-${K}of16" --methods=dense,value_groups --query=4
  measure "untrained-${K}of16" --init_from="$MODEL" --methods=dense,value_groups --n_groups=16 \
    --topk_groups=$K --reconstructor=keys --query=4 --calibrate="$MIXTURE" --calibration=24
done

# as many bytes as 8 of 16 groups, of one dimension each, trained and untrained
train "$OUT/maps-29of64" --adapt_steps="$STEPS" --adapter=none --n_groups=64 --topk_groups=29 \
  --reconstructor=keys --learn_basis --kv_tail=4 --block_size=1024 --adapt_batch_size=8 \
  --adapt_lr=1e-3
measure maps-29of64 --out_dir="$OUT/maps-29of64" --methods=dense,value_groups --query=4
measure untrained-29of64 --init_from="$MODEL" --methods=value_groups --n_groups=64 \
  --topk_groups=29 --reconstructor=keys --query=4 --calibrate="$MIXTURE" --calibration=24

# selected contexts, each share by itself: maps alone, and at one share with low-rank adapters
SHARES=0.22,0.125,0.0625,0.04,0.02
for SHARE in ${SHARES//,/ }; do
  for KIND in none lora; do
    [[ $KIND == none || $SHARE == 0.0625 ]] || continue
    TARGETS=""
    [[ $KIND == none ]] || TARGETS="--lora_targets=q,o"
    train "$OUT/$KIND-$SHARE" --adapt_steps="$SELECT_STEPS" --kv=select --kv_from="$RUN" \
      --adapter=$KIND $TARGETS --learn_basis --kv_byte_budgets="$SHARE" --block_size=2048 \
      --context=0.9 --adapt_batch_size=4 --adapt_lr=2e-4
    measure "select-$KIND-$SHARE" --out_dir="$OUT/$KIND-$SHARE" --methods=dense,select \
      --kv_byte_budgets="$SHARE"
    measure "select-$KIND-$SHARE-refit" --out_dir="$OUT/$KIND-$SHARE" --methods=select --refit \
      --kv_byte_budgets="$SHARE"
  done
done
measure select-untrained --out_dir="$RUN" --methods=dense,select --kv_byte_budgets=$SHARES
measure select-untrained-refit --out_dir="$RUN" --methods=select --refit --kv_byte_budgets=$SHARES
