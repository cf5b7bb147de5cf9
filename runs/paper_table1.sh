#!/usr/bin/env bash
# The paper's table 1 on SmolLM2-135M: WikiText-2 and code, equal parameters, five seeds of 300 steps,
# every row at the rate of its lowest validation loss; in 16 bits, with integers at 30 % of the bytes
# or fewer, and with the paper's storage. The table of the page was made by one rate of 1e-3, 100
# steps and three seeds; this script has not been run yet.
# usage: runs/paper_table1.sh [MODEL] [OUT] [VALID_TEXT] [TEST_TEXT]
set -euo pipefail
MODEL="${1:-SmolLM2-135M-Instruct.Q4_1.gguf}"
OUT="${2:-out/paper_table1}"
VALID="${3:-wikitext2.valid.txt}"
TEST="${4:-wikitext2.test.txt}"

wikitext="--adapt_dataset=text:$VALID --test_dataset=text:$TEST --test_sequences=600"
pycode="--adapt_dataset=pycode --test_sequences=200"
table="--init_from=$MODEL --detokenize --block_size=512 --adapt_steps=300 --seeds=5
  --adapt_rates=5e-4,1e-3,2e-3 --eval_interval=50 --eval_sequences=40 --max_minutes=600"
equal="--subspaces=16 --subspace_topk=8 --r=1 --learn_basis --distill_steps=250"

# half of every value in 16 bits; the sub-token row starts from a basis distilled for 250 steps
half="--n_groups=16 --topk_groups=8 --kv_tail=16"
python train.py $table $equal $half $wikitext --out_dir="$OUT/wikitext"
python train.py $table $equal $half $pycode --out_dir="$OUT/pycode"

# three of four groups, keys and values of 3 bits: 29 % of the bytes at 512 tokens
bits="--n_groups=4 --topk_groups=3 --key_bits=3 --value_bits=3 --key_block=32 --kv_tail=4"
python train.py $table $equal $bits $wikitext --out_dir="$OUT/wikitext-bits"
python train.py $table $equal $bits $pycode --out_dir="$OUT/pycode-bits"

# WikiText-2, the paper's ranks and storage (native basis, linear router, MLP reconstructor)
python train.py --preset=paper $table $wikitext --out_dir="$OUT/paper"
