#!/usr/bin/env bash
# The paper's table 1 on SmolLM2-135M: WikiText-2 and code, equal parameters, five seeds of 300
# steps, every row at the one of three rates with the lowest validation loss; with half of every
# value in 16 bits, with 29 of 64 groups, without and with all subspaces used, with 10 of 16 groups
# in 4 bits and the keys in 3, and over values from keys.
# Code is the standard library's source, every tenth file kept back for the number.
# LoRA and MoE-LoRA store everything either way: a text's other tables take the first one's (the
# page's of 64 groups and over values from keys have two seeds, `wikitext-keys0` one, most trained
# beside LoRA rows of their own, at the rates chosen for 16 groups).
# usage: runs/paper_table1.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/paper_table1}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

mkdir -p "$OUT"
python -c "
import json, sys
from cli import exit_on_bad_input
from data import DataConfig, documents

def write():
    docs = documents('pycode', DataConfig())['all']
    parts = {'test': docs[::10], 'adapt': [d for i, d in enumerate(docs) if i % 10]}
    for name, part in parts.items():
        with open(f'{sys.argv[1]}/{name}.jsonl', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps({'text': d}) + '\n' for d in part)

exit_on_bad_input(write)
" "$OUT"

table() {  # table NAME FLAGS...: all tables of a text
  name="$1"
  shift
  about="--init_from=$MODEL --block_size=512 --adapt_steps=300 --seeds=5
    --eval_interval=50 --eval_sequences=40 --test_sequences=600 --max_minutes=600
    --n_groups=16 --subspaces=16 --subspace_topk=8 --r=1 --learn_basis
    --distill_steps=250"
  python train.py $about "$@" --topk_groups=8 --kv_tail=16 --out_dir="$OUT/$name"
  mkdir -p "$OUT/$name-bits"
  cp -r "$OUT/$name"/*lora-s* "$OUT/$name-bits"
  python train.py $about "$@" --topk_groups=10 --key_bits=3 --value_bits=4 --key_block=16 \
    --kv_tail=1 --resume --out_dir="$OUT/$name-bits"
  # as many bytes as half of 16 groups, of one dimension each
  for used in "" all; do
    fine="--n_groups=64 --topk_groups=29 --kv_tail=16"
    [[ $used == "" ]] || fine="$fine --subspace_topk=16"
    mkdir -p "$OUT/$name-64$used"
    cp -r "$OUT/$name"/*lora-s* "$OUT/$name-64$used"
    python train.py $about "$@" $fine --resume --out_dir="$OUT/$name-64$used"
  done
  # values from keys: their map counts, so the adapter has fewer subspaces; half of them, and none
  for K in 8 0; do
    mkdir -p "$OUT/$name-keys$K"
    cp -r "$OUT/$name"/*lora-s* "$OUT/$name-keys$K"
    python train.py $about "$@" --subspaces=10 --reconstructor=keys --topk_groups=$K --kv_tail=16 \
      --resume --out_dir="$OUT/$name-keys$K"
  done
}

# a basis is first distilled for 250 steps on the same text
table wikitext --adapt_rates=1e-4,2e-4,5e-4 --detokenize --adapt_dataset="text:$VALID" \
  --test_dataset="text:$TEST"
table code --adapt_rates=5e-4,1e-3,2e-3 --adapt_dataset="text:$OUT/adapt.jsonl" \
  --test_dataset="text:$OUT/test.jsonl"
