#!/usr/bin/env bash
# mixSGA beside GQA and CLA on a GPU: 31.6 M parameters, 1,024 tokens, two seeds.
# On an H100 the base takes 105 s, all of the 20-step table 190 s a seed.
# The 20-step command is the record's own; 8 and 100 steps are the same but for --steps.
# usage: runs/mixsga_gpu.sh [OUT]
set -euo pipefail
OUT="${1:-out/mixsga_gpu}"

# the base
python train.py --stage=pretrain --n_layer=10 --n_embd=512 --n_head=8 --n_kv_head=8 \
  --head_dim=64 --n_inner=1376 --block_size=1024 --dataset=pycode --pretrain_steps=2000 \
  --pretrain_batch_size=32 --pretrain_lr=1e-3 --compile --out_dir="$OUT/base"

# the rows after 8, 20 and 100 steps of training on
for STEPS in 8 20 100; do
  python eval.py --tasks=mixsga --out_dir="$OUT/base/pretrain" --kv_tail=32 --sequences=64 \
    --lr=3e-4 --steps="$STEPS" --seeds=2 \
    --mixes=3:1:6,1:1:8,2-4-8@1:4:2,1-2@1:1,3:1:6+2,1-4@1:2,9:6:6:8 \
    --results="$OUT/table-$STEPS"
done
