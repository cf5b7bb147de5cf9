"""Text from a trained run, generated through the packed cache, with the bytes that cache held.

    python sample.py --out_dir=out/... --prompt="def " --max_new_tokens=200 --temperature=0
"""
from __future__ import annotations

import sys
import time

from config import SampleConfig, exit_on_bad_input, parse_args

if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args({"sample": SampleConfig}, description=__doc__.splitlines()[0])

from model import generate
from pretrained import autocast, load_run, pick_device


def main() -> None:
    cfg: SampleConfig = ARGS.sample
    device = pick_device(cfg.device)
    run = load_run(cfg.out_dir, device)
    prompts = [run.tokenizer.encode(cfg.prompt)] * cfg.num_samples
    start = time.time()
    with autocast(device, cfg.dtype):
        rows, cache = generate(run.model, prompts, cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                               seed=cfg.seed, stop=run.tokenizer.eot)
    seconds, m = time.time() - start, run.model.cfg
    for r in rows:
        print(cfg.prompt + run.tokenizer.decode(r))
        print("-" * 20)
    dense = 2 * m.n_layer * m.n_kv_head * m.head_dim * cache.length * len(rows) * run.model.embed_tokens.weight.element_size()
    print(f"{sum(map(len, rows))} tokens in {seconds:.2f} s; the cache held {cache.nbytes():,} bytes for {cache.length} tokens a row, "
          f"{cache.nbytes() / dense:.1%} of a dense one's {dense:,}", file=sys.stderr)


if __name__ == "__main__":
    exit_on_bad_input(main)
