#!/usr/bin/env bash
# Time of a training step beside a plain loop's, and of routed LoRA beside LoRA's. Two CPU cores.
# The time was not noted.
# usage: runs/step_speed.sh
set -euo pipefail

# a pretraining step against a plain loop of the same layers
python bench.py train

# an adaptation step of routed subspace LoRA against LoRA of the same total rank
python bench.py adapter
