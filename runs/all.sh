#!/usr/bin/env bash
# Every table of docs/results.md: the scripts in order, then the page from what they left.
# Left out, with a line that says so: a script whose results this code has made, unless FORCE=1 is
# set, and one that needs a GPU, the model (runs/prepare.sh) or a file where there is none. Results
# of before are not lost: they are moved to FOLDER.before-N.
# usage: [FORCE=1] runs/all.sh
set -euo pipefail
trap 'exit 130' INT TERM

# a line for each script: its name, and a key of it and the code
KEYS=$'\n'"$(python -m report.made)"
FAILED=""

# table NAME FOLDER NEEDS WHAT: run a script, which fills FOLDER. FOLDER.state then says "begun",
# and when all is there the script's key.
table() {
  local name="$1" folder="$2" needs="$3" key n=1
  echo "runs/$name.sh ($needs): $4"
  key="${KEYS#*$'\n'"$name.sh "}"
  key="${key%%$'\n'*}"
  if [[ -z "${FORCE:-}" && -d "$folder" && -f "$folder.state" ]] &&
    [[ "$(< "$folder.state")" == "$key" ]]; then
    echo "  left out: $folder is of this code"
    return
  fi
  if [[ "$needs" == *GPU* ]] && ! command -v nvidia-smi > /dev/null; then
    echo "  left out: no GPU"
    return
  fi
  if [[ "$needs" == "two GPUs"* && "$(nvidia-smi -L | wc -l)" -lt 2 ]]; then
    echo "  left out: no second GPU"
    return
  fi
  if [[ "$needs" == *model* && ! -e SmolLM2-135M-Instruct.Q4_1.gguf ]]; then
    echo "  left out: no model, runs/prepare.sh fetches it"
    return
  fi
  for word in ${needs//,/}; do
    if [[ "$word" == *.jsonl && ! -e "$word" ]]; then
      echo "  left out: no $word"
      return
    fi
  done
  mkdir -p out
  echo begun > "$folder.state"
  if [[ -e "$folder" ]]; then
    while [[ -e "$folder.before-$n" ]]; do n=$((n + 1)); done
    mv "$folder" "$folder.before-$n"
  fi
  if bash "runs/$name.sh"; then
    echo "$key" > "$folder.state"
  else
    FAILED="$FAILED $name"
    echo "  failed: its table stays as it is"
  fi
}

# the files that choices.sh reads
ITEMS="hellaswag.jsonl, piqa.jsonl, winogrande.jsonl, arc_easy.jsonl, arc_challenge.jsonl, \
openbookqa.jsonl, boolq.jsonl, copa.jsonl, lambada.jsonl"

table default_table out/default_table CPU "LoRA, MoE-LoRA and the sub-token row, small model"
table adapters out/adapters CPU "adapters over whole and routed values, nine seeds"
table levers out/levers CPU "what each part of the storage is worth"
table static_router out/static_router CPU "routing per token, or always the first groups"
table learned_basis out/learned_basis CPU "a trained basis, small model"
table paper_table1 out/paper_table1 "GPU, model" "the paper's table 1, five seeds"
table value_groups out/value_groups "GPU, model" "value groups without training"
table trained_basis out/basis "GPU, model" "value groups with trained maps"
table mixture out/mixture "GPU, model" "predictors of a mixture of texts, measured on eight texts"
table selection out/selection "GPU, model" "which tokens and groups stay, after mixture.sh"
table hedge out/hedge "GPU, model" "the exponent on relevance, after mixture.sh"
table recall out/recall "GPU, model" "needles asked of a compressed cache, after mixture.sh"
table coding out/coding "GPU, model" "a prompt as a string of bytes, on eight texts"
table ablation out/ablation "GPU, model" "what each step gives, after mixture.sh"
table distilled out/distilled "GPU, model" "storage in the loop of training, after mixture.sh"
table layers out/layers model "what keys tell of values and lose in few bits, layer by layer"
table published out/published "GPU, model" "rivals as they were published"
table bits out/bits "GPU, model" "loss and divergence against bytes, after mixture.sh"
table paper_selection out/paper_selection "GPU, model" "the paper's own selection"
table choices out/choices "GPU, model, $ITEMS" "zero-shot choices over compressed caches"
table instruct out/instruct "GPU, model, train.jsonl, test.jsonl" "instructions by ROUGE-L"
table mixsga out/mixsga CPU "mixSGA, GQA and CLA, small model"
table mixsga_miniature out/mixsga_miniature CPU "the same in miniature"
table mixsga_gpu out/mixsga_gpu GPU "the same by how long is trained on"
table decode_speed out/decode_speed GPU "attention of one token over a packed cache"
table step_speed out/step_speed CPU "training steps beside a plain loop's and LoRA's"
table train_speed out/train_speed GPU "training steps as one CUDA graph, beside PEFT's"
table generate_speed out/generate_speed "GPU, model" "tokens per second of the whole model"
table speed_plot out/speed_plot GPU "tokens per second against batch and context, with limits"
table two_gpus out/two_gpus "two GPUs" "training and generation over two GPUs"
table memory out/memory GPU "how many sequences fit"
table park out/park "CPU, model" "caches put away as strings of bytes, and back"

python -m report.page
if [[ -n "$FAILED" ]]; then
  echo "failed:$FAILED" >&2
  exit 1
fi
