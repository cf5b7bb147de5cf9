#!/usr/bin/env bash
# Layer by layer: how much of a value its key tells, what the map for it weighs beside what it
# saves, and what few bits of a key do to its logits. Fitted on WikiText-2 validation, measured on
# another text. A CPU does it in some minutes.
# usage: runs/layers.sh [MODEL] [OUT] [VALID_TEXT] [OTHER]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/layers}"
VALID="${3:-wikitext2.valid.txt}"
OTHER="${4:-shakespeare}" # corpus that is measured

python -m benchmarks.layers --init_from="$MODEL" --calibrate="text:$VALID" --dataset="$OTHER" \
  --detokenize --calibration=24 --sequences=16 --block_size=768 --results="$OUT"
