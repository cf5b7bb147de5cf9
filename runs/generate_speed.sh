#!/usr/bin/env bash
# Tokens per second of SmolLM2-135M, packed and dense. Needs one GPU.
# The commands before the last loop were put together from the settings that their table names, an
# H100's; their time was not noted. The loop took 124 s on an H200.
# usage: runs/generate_speed.sh [MODEL] [OUT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/generate_speed}"

# batch 1, a prompt of 2,048 tokens, 8 of 16 groups
python bench.py generate --init_from="$MODEL" --weights=bfloat16 --block_size=2304 \
  --new_tokens=256 --batch_size=1 --kv=value_groups --n_groups=16 --topk_groups=8 --compile \
  --results="$OUT/one"

# batch 64, prompts of 8,120 tokens, a quarter of keys and values
python bench.py generate --init_from="$MODEL" --weights=bfloat16 --block_size=8192 \
  --new_tokens=72 --batch_size=64 --kv=select --n_groups=16 --kv_keep=0.25 --kv_tail=16 \
  --prefill_tokens=65536 --compile --results="$OUT/quarter"

# the same in integers: a level of bits for every value group
python bench.py generate --init_from="$MODEL" --weights=bfloat16 --block_size=8192 \
  --new_tokens=72 --batch_size=64 --kv=select --n_groups=8 --kv_bytes=0.125 --kv_tail=16 \
  --prefill_tokens=65536 --compile --results="$OUT/levels"

# every group in 4 bits
python bench.py generate --init_from="$MODEL" --weights=bfloat16 --block_size=8192 \
  --new_tokens=72 --batch_size=64 --kv=value_groups --n_groups=4 --topk_groups=4 --key_bits=4 \
  --value_bits=4 --prefill_tokens=65536 --compile --results="$OUT/bits4"

# without a compiler: an eighth of the bytes at batch 64 and 1, and the parts of the prefill
for batch in 64 1; do
  python bench.py generate --init_from="$MODEL" --weights=bfloat16 --block_size=8192 \
    --new_tokens=72 --batch_size=$batch --kv=select --n_groups=8 --kv_bytes=0.125 --kv_tail=16 \
    --prefill_tokens=65536 --parts --results="$OUT/parts/$batch"
done
