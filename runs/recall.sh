#!/usr/bin/env bash
# Recall: needles asked of a cache that was compressed before the question was known, one and four
# of them, digits, numbers and names, and passages copied from what was held out of each text that
# the run was trained on; 600, 2,048 and 8,000 tokens. With the question seen before compressing,
# for comparison, and with distractors, a second question and variables to follow.
# Needs the run of runs/mixture.sh, and the text that it was trained on.
# usage: [PROMPTS=100] runs/recall.sh [RUN] [OUT]
set -euo pipefail
RUN="${1:-out/mixture}"
OUT="${2:-out/recall}"
PROMPTS="${PROMPTS:-100}"

measure() {  # measure NAME FLAGS...: dense, and a prompt in these shares of its bytes
  name="$1"
  shift
  python eval.py --out_dir="$RUN" --methods=dense,select --relevances=predictor_query \
    --kv_byte_budgets=0.25,0.125,0.0625 --sequences="$PROMPTS" --results="$OUT/$name" "$@"
}

for length in 600 2048 8000; do
  about="--block_size=$length --batch_size=$((100000 / length))"
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

# a needle among 3 distractors, and a second needle asked of the same cache
measure distractors --tasks=needle,needle_reuse --distractors=3 --block_size=2048 --batch_size=20

# variable tracking, one hop
measure variable_tracking --tasks=variable_tracking --hops=1 --block_size=384 --batch_size=50
