#!/usr/bin/env bash
# Adaptation of the small model with a trained value basis, on two bases.
# The time was not noted; runs/default_table.sh, the same without the maps, takes 156 s.
# Put together after the table.
# usage: runs/learned_basis.sh [OUT]
set -euo pipefail
OUT="${1:-out/learned_basis}"
export OMP_NUM_THREADS=1  # the table was made on one core

for SEED in 0 3; do
  # no trained maps (82,000 parameters and more)
  python train.py --seed="$SEED" --max_minutes=60 --out_dir="$OUT/none-$SEED"
  # trained maps, distilled for 60 steps first (98,000 parameters and more)
  python train.py --seed="$SEED" --learn_basis --distill_steps=60 --max_minutes=60 \
    --out_dir="$OUT/distilled60-$SEED"
done

# the rows that were made on the first base only
python train.py --learn_basis --max_minutes=60 --out_dir="$OUT/learned-0"
python train.py --learn_basis --distill_steps=120 --max_minutes=60 --out_dir="$OUT/distilled120-0"
python train.py --subspaces=16 --subspace_topk=8 --r=1 --max_minutes=60 --out_dir="$OUT/rank1-0"
