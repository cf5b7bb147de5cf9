#!/usr/bin/env bash
# Recall: needles asked of a cache that was compressed before the question was known, one and four
# of them, digits, numbers and names, and passages copied from what was held out of each text that
# the run was trained on; 600, 2,048 and 8,120 tokens. With the question seen before compressing, for
# comparison. Not run yet.
# Needs the run of runs/mixture.sh, and the text that it was trained on.
# usage: runs/recall.sh [RUN] [OUT]
set -euo pipefail
RUN="${1:-out/mixture}"
OUT="${2:-out/recall}"

measure() {  # measure NAME FLAGS...: dense, and a prompt in these shares of its bytes
  name="$1"
  shift
  python eval.py --out_dir="$RUN" --methods=dense,select --relevances=predictor_query \
    --kv_byte_budgets=0.25,0.125,0.0625 --results="$OUT/$name" "$@"
}

for length in 600 2048 8120; do
  about="--block_size=$length --sequences=100 --batch_size=4 --query=4"
  for question in unseen seen; do
    # one needle, and a passage
    measure "one_${question}_$length" --tasks=needle,copy --question=$question $about
    # four needles, numbers and names
    for answer in number name; do
      measure "${answer}_${question}_$length" --tasks=needle --question=$question --needles=4 \
        --answer=$answer $about
    done
  done
done
