#!/usr/bin/env bash
# How many sequences of 8,192 tokens fit into 2 GiB, by what is kept of them. Needs one GPU.
# The time was not noted.
# usage: runs/memory.sh [OUT]
set -euo pipefail
OUT="${1:-out/memory}"

# caches of one sequence until the allocator has given out 2 GiB
python bench.py memory --n_kv_head=8 --head_dim=128 --block_size=8192 --memory_gb=2 \
  --results="$OUT"
