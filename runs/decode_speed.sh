#!/usr/bin/env bash
# Attention of one new token over a packed cache, beside dense attention. Needs one GPU: 16 bits and
# other shapes were measured on an H100, all else on an H200 in three minutes, but for the last two
# commands, which take a CPU.
# The first command is the record's own; the others were put together from the table's rows.
# usage: runs/decode_speed.sh [OUT]
set -euo pipefail
OUT="${1:-out/decode_speed}"

# 16 bits: batch 8, 32,768 tokens, 32 heads, 8 KV heads of 128
python bench.py decode --n_head=32 --n_kv_head=8 --head_dim=128 --block_size=32768 \
  --batch_size=8 --cases=4:0.5,8:0.5,16:0.5,4:0.25,16:0.5:0.5,16:0.5:0.25 \
  --results="$OUT/bits16"

# the same shape in 4 and 8 bits, and with a level of bits for every value group
python bench.py decode --n_head=32 --n_kv_head=8 --head_dim=128 --block_size=32768 \
  --batch_size=8 --cases=4:1:1:4,4:1:1:8,4:0.5:1:4,8:0.9:0.43:4:0,8:0.9:0.43:4 \
  --results="$OUT/integers"

# the same shape in 2 and 3 bits
python bench.py decode --n_head=32 --n_kv_head=8 --head_dim=128 --block_size=32768 \
  --batch_size=8 --cases=4:1:1:3,4:0.5:1:3,4:1:1:2,4:0.5:1:2,8:0.9:0.43:3:0 \
  --results="$OUT/few_bits"

# one sequence
python bench.py decode --n_head=32 --n_kv_head=8 --head_dim=128 --block_size=32768 \
  --batch_size=1 --cases=16:0.5:0.5,4:1:1:4,4:0.5:1:4,8:0.9:0.43:4:0 \
  --results="$OUT/one"

# the same bytes read as residuals of values predicted from keys: by kernel and plainly for own
# heads, plainly for all heads; and SmolLM2's shape
python bench.py decode --from_keys --n_head=32 --n_kv_head=8 --head_dim=128 --block_size=32768 \
  --batch_size=8 --cases=4:0.5,8:0.25 --results="$OUT/from_keys/128"
python bench.py decode --from_keys --n_head=9 --n_kv_head=3 --head_dim=64 --block_size=8192 \
  --batch_size=8 --cases=4:0.5,8:0.25 --results="$OUT/from_keys/smollm2"

# a shorter and a longer context, and SmolLM2's shape
python bench.py decode --n_head=32 --n_kv_head=8 --head_dim=128 --block_size=8192 \
  --batch_size=8 --cases=4:0.5,8:0.5,16:0.5 --results="$OUT/shapes/8192"
python bench.py decode --n_head=32 --n_kv_head=8 --head_dim=128 --block_size=131072 \
  --batch_size=2 --cases=4:0.5,8:0.5,16:0.5 --results="$OUT/shapes/131072"
python bench.py decode --n_head=9 --n_kv_head=3 --head_dim=64 --block_size=32768 \
  --batch_size=8 --cases=4:0.5,8:0.5,16:0.5 --results="$OUT/shapes/smollm2"

# on a CPU, in float32: beside PyTorch's fused attention there
OMP_NUM_THREADS=1 python bench.py decode --device=cpu --n_head=9 --n_kv_head=3 --head_dim=64 \
  --block_size=2048 --batch_size=1 --results="$OUT/cpu/smollm2_2048" \
  --cases=4:0.5,16:0.5:0.5,4:1:1:4,4:0.5:1:4,8:0.9:0.43:4:0,8:0.9:0.43:4
python bench.py decode --device=cpu --n_head=32 --n_kv_head=8 --head_dim=128 --block_size=8192 \
  --batch_size=1 --cases=4:0.5,16:0.5,16:0.5:0.5,4:1:1:4,4:0.5:1:4,8:0.9:0.43:4:0 \
  --results="$OUT/cpu/8192"
