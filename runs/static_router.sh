#!/usr/bin/env bash
# Is it routing or the basis? The small model with groups chosen per token by norm, and with the
# first K groups of every token. The commands that measure took 84 seconds on
# one CPU thread.
# usage: runs/static_router.sh [OUT]
set -euo pipefail
OUT="${1:-out/static_router}"

# the base that all rows adapt
python train.py --stage=pretrain --out_dir="$OUT/base"

for ROUTER in norm static; do
  for SEED in 0 1; do
    # K = 2 of 4, a tail of 4 tokens
    python train.py --stage=adapt --init_from="$OUT/base" --adapter=routed --kv=value_groups \
      --value_router="$ROUTER" --topk_groups=2 --kv_tail=4 --seed="$SEED" \
      --out_dir="$OUT/$ROUTER-k2-$SEED"
    python eval.py --out_dir="$OUT/$ROUTER-k2-$SEED"
    # K = 1 of 4, no tail
    python train.py --stage=adapt --init_from="$OUT/base" --adapter=routed --kv=value_groups \
      --value_router="$ROUTER" --topk_groups=1 --kv_tail=0 --seed="$SEED" \
      --out_dir="$OUT/$ROUTER-k1-$SEED"
    python eval.py --out_dir="$OUT/$ROUTER-k1-$SEED"
  done
done
