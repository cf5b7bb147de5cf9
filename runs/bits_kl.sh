#!/usr/bin/env bash
# How far predictions are from those over whole values (KL), by bytes. Needs runs/bits.sh first.
# The table came from another script, over 24 evenly spaced windows; eval.py's KL column sees its
# first 16 windows, so its numbers differ a little. The time was not noted.
# Put together after the table.
# usage: runs/bits_kl.sh [RUN] [OUT]
set -euo pipefail
RUN="${1:-out/bits}"
OUT="${2:-out/bits_kl}"

# the bits that the planner picks
python eval.py --out_dir="$RUN" --tasks=continuation --split=val --sequences=16 \
  --block_size=2048 --batch_size=8 --dtype=float32 --methods=dense,select \
  --kv_byte_budgets=0.28,0.22,0.19,0.15,0.125,0.1,0.0625,0.04 --results="$OUT/planner"

# levels with keys of 4 bits, and 4 bits of everything that is kept
python eval.py --out_dir="$RUN" --tasks=continuation --split=val --sequences=16 \
  --block_size=2048 --batch_size=8 --dtype=float32 --methods=dense,select \
  --kv_byte_budgets=0.28,0.22,0.19,0.15,0.125,0.1,0.0625,0.04 --kv_bits=4:0,4 \
  --results="$OUT/keys4"
