#!/usr/bin/env bash
# mixSGA beside GQA and CLA at equal keys and values: the default model, 256 tokens, two seeds.
# The base takes 6 minutes on two busy cores; the time of the table was not noted.
# usage: runs/mixsga.sh [OUT]
set -euo pipefail
OUT="${1:-out/mixsga}"

# the base
python train.py --stage=pretrain --dataset=pycode --block_size=256 --pretrain_steps=1500 \
  --out_dir="$OUT/base"

# every row trains on for 40 steps; ablations and H2O on top for the first mix
python eval.py --tasks=mixsga --out_dir="$OUT/base/pretrain" --steps=40 --lr=3e-4 \
  --batch_size=8 --sequences=48 --seeds=2 \
  --mixes=3:1:6,1:1:8,2-4-8@1:4:2,1-2@1:1,3:1:6+2 --results="$OUT/table"
