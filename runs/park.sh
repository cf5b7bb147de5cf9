#!/usr/bin/env bash
# Caches put away as strings of bytes: how short, and how fast, on one core of a CPU. Windows of a
# text that neither the ways to store nor the code were chosen on. About ten minutes.
# usage: [SEQUENCES=5] runs/park.sh [MODEL] [OUT] [TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/park}"
TEXT="${3:-wikitext2.test.txt}"
SEQUENCES="${SEQUENCES:-5}" # prompts of 2,048 tokens

python -m benchmarks.park --init_from="$MODEL" --dataset="text:$TEXT" --sequences="$SEQUENCES" \
  --device=cpu --results="$OUT"
