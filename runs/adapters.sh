#!/usr/bin/env bash
# Adapters of the small model over whole and over routed values, nine seeds.
# The commands that measure took 379 seconds on one CPU thread.
# usage: runs/adapters.sh [OUT]
set -euo pipefail
OUT="${1:-out/adapters}"

# the base that all rows adapt
python train.py --stage=pretrain --out_dir="$OUT/base"

# row NAME FLAGS: one row, nine seeds, with its perplexity
row() {
  local name="$1"
  shift
  for SEED in 0 1 2 3 4 5 6 7 8; do
    python train.py --stage=adapt --init_from="$OUT/base" --seed="$SEED" \
      --out_dir="$OUT/$name-$SEED" "$@"
    python eval.py --out_dir="$OUT/$name-$SEED"
  done
}

row routed-8of16 --adapter=routed --subspaces=16 --subspace_topk=8 --r=1 --kv=value_groups
row moe-lora --adapter=moe_lora --experts=4 --expert_topk=2 --r=5 --kv=dense
row routed-4of8-pca --adapter=routed --subspaces=8 --subspace_topk=4 --r=2 --kv=value_groups \
  --value_basis=pca
row routed-4of8 --adapter=routed --subspaces=8 --subspace_topk=4 --r=2 --kv=value_groups
row routed-4of8-whole --adapter=routed --subspaces=8 --subspace_topk=4 --r=2 --kv=dense
row lora --adapter=lora --r=21 --kv=value_groups
row lora-whole --adapter=lora --r=21 --kv=dense
row routed-4of4 --adapter=routed --subspaces=4 --subspace_topk=4 --r=4 --kv=value_groups
row routed-2of4 --adapter=routed --subspaces=4 --subspace_topk=2 --r=4 --kv=value_groups
