#!/usr/bin/env bash
# Tokens per second of training and decoding against batch and context, at SmolLM2-135M's shape:
# ours, PEFT's LoRA, transformers' generate, PyTorch's attention, and what the memory and the
# products of the same run allow. One quiet GPU, 300 s: what would begin later is left out, with a
# line that says so. pip install peft transformers. The picture is OUT/speed.png.
# usage: runs/speed_plot.sh [OUT]
set -euo pipefail
OUT="${1:-out/speed_plot}"
SMOL="--vocab_size=49152 --n_layer=30 --n_embd=576 --n_head=9 --n_kv_head=3 --head_dim=64
  --n_inner=1536 --block_size=512"

python -m benchmarks.speed $SMOL --peers --results="$OUT"
