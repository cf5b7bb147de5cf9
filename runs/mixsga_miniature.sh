#!/usr/bin/env bash
# mixSGA beside GQA and CLA in miniature: pretrains its own base. 122 s on two
# cores; the table took 179 s on one CPU thread.
# usage: runs/mixsga_miniature.sh [OUT]
set -euo pipefail
OUT="${1:-out/mixsga_miniature}"

# no flags: 20 steps at a rate of 5e-4, one seed
python eval.py --tasks=mixsga --results="$OUT"
