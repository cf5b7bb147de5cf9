#!/usr/bin/env bash
# Time of a training step beside a plain loop's, and of routed LoRA beside LoRA's. Two CPU cores.
# The time was not noted.
# usage: runs/step_speed.sh [OUT]
set -euo pipefail
OUT="${1:-out/step_speed}"

# a pretraining step against a plain loop of the same layers
python bench.py train --results="$OUT/train"

# an adaptation step of routed subspace LoRA against LoRA of the same total rank
python bench.py adapter --results="$OUT/adapter"
