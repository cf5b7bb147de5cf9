#!/usr/bin/env bash
# The paper's table 1 on SmolLM2-135M, in three settings. The three commands took 424, 399 and 366 s
# while they shared one H200.
# The last two commands were put together from the settings that the table names.
# usage: runs/paper_table1.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/paper_table1}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

# WikiText-2, equal parameters; the sub-token row starts from a basis distilled for 250 steps
python train.py --init_from="$MODEL" --adapt_dataset="text:$VALID" --test_dataset="text:$TEST" \
  --test_sequences=600 --detokenize --block_size=512 --adapt_steps=100 --adapt_lr=1e-3 \
  --eval_interval=50 --eval_sequences=40 --n_groups=16 --topk_groups=8 --kv_tail=16 \
  --learn_basis --distill_steps=250 --subspaces=16 --subspace_topk=8 --r=1 --max_minutes=8 \
  --out_dir="$OUT/wikitext"

# the same on code: Python's standard library
python train.py --init_from="$MODEL" --adapt_dataset=pycode \
  --test_sequences=200 --detokenize --block_size=512 --adapt_steps=100 --adapt_lr=1e-3 \
  --eval_interval=50 --eval_sequences=40 --n_groups=16 --topk_groups=8 --kv_tail=16 \
  --learn_basis --distill_steps=250 --subspaces=16 --subspace_topk=8 --r=1 --max_minutes=8 \
  --out_dir="$OUT/pycode"

# WikiText-2, the paper's ranks and storage (native basis, linear router, MLP reconstructor)
python train.py --preset=paper --init_from="$MODEL" --adapt_dataset="text:$VALID" \
  --test_dataset="text:$TEST" --test_sequences=600 --detokenize --adapt_steps=100 \
  --adapt_lr=1e-3 --eval_interval=50 --eval_sequences=40 --max_minutes=8 --out_dir="$OUT/paper"
