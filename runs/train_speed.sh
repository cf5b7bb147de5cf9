#!/usr/bin/env bash
# Steps of adaptation and pretraining at SmolLM2-135M's shape, 8 sequences of 512 tokens: as one
# CUDA graph and kernel by kernel; then all of it compiled, too, PEFT's LoRA, eager and compiled,
# beside it. One quiet GPU; pip install peft transformers.
# usage: runs/train_speed.sh [OUT]
set -euo pipefail
OUT="${1:-out/train_speed}"
SMOL="--vocab_size=49152 --n_layer=30 --n_embd=576 --n_head=9 --n_kv_head=3 --head_dim=64
  --n_inner=1536 --block_size=512"

python -m benchmarks.step $SMOL --results="$OUT/plain"
python -m benchmarks.step $SMOL --compile --peers --results="$OUT/compiled"
