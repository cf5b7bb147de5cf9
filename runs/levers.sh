#!/usr/bin/env bash
# Basis, router, mask and tail of the small model's sub-token row, three seeds each.
# Written after the table: the rows were first made one by one. Rows whose reconstructor is linear
# or pairwise cannot be made any more. The time was not noted.
# usage: runs/levers.sh [OUT]
set -euo pipefail
OUT="${1:-out/levers}"

# the base that all rows adapt
python train.py --stage=pretrain --out_dir="$OUT/base"

# row NAME FLAGS: routed LoRA, 4 subspaces of rank 4, 2 kept; then its perplexity over routed and
# over whole values
row() {
  local name="$1"
  shift
  for SEED in 0 1 2; do
    python train.py --stage=adapt --init_from="$OUT/base" --adapter=routed --subspaces=4 \
      --subspace_topk=2 --r=4 --kv=value_groups --n_groups=4 --topk_groups=2 --kv_tail=0 \
      --seed="$SEED" --out_dir="$OUT/$name-$SEED" "$@"
    python eval.py --out_dir="$OUT/$name-$SEED" --methods=dense,value_groups
  done
}

row native-linear-layer --value_basis=native --value_router=linear --mask_scope=layer
row native-linear-layer-mlp --value_basis=native --value_router=linear --mask_scope=layer \
  --reconstructor=mlp
row native-norm-head --value_basis=native
row random-norm-head --value_basis=random
row output-linear-layer --value_router=linear --mask_scope=layer
row output-linear-layer-lm --value_router=linear --mask_scope=layer --lm_to_router
row output-linear-head --value_router=linear
row output-norm-layer --mask_scope=layer
row output-norm-head
row pca-norm-head --value_basis=pca
row output-16 --n_groups=16 --topk_groups=8
row pca-16 --value_basis=pca --n_groups=16 --topk_groups=8
row output-tail1 --kv_tail=1
row output-tail4 --kv_tail=4
row pca-tail4 --value_basis=pca --kv_tail=4
row output-tail4-8 --kv_tail=4 --n_groups=8 --topk_groups=4
row pca-tail4-8 --value_basis=pca --kv_tail=4 --n_groups=8 --topk_groups=4
row output-layer-tail12 --mask_scope=layer --kv_tail=12
row output-tail4-warmup --kv_tail=4 --kv_warmup=0.5
row output-tail4-nobalance --kv_tail=4 --balance_weight=0
row output-tail4-4of4 --kv_tail=4 --subspace_topk=4
row output-tail4-4of8 --kv_tail=4 --subspaces=8 --subspace_topk=4 --r=2
