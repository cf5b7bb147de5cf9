"""Text from a trained run or a pretrained model, generated through the packed cache, with the bytes
that cache held.

    python sample.py --init_from=SmolLM2-135M-Instruct.Q4_1.gguf \\
        --prompt="The capital of France is" --temperature=0
    python sample.py --out_dir=out/... --prompt="def " --max_new_tokens=200 --temperature=0
"""

from __future__ import annotations

import sys
import time

from cli import exit_on_bad_input, parse_args
from config import BaseConfig
from measure_config import SampleConfig

CONFIGS = {"sample": SampleConfig, "base": BaseConfig}
if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__.splitlines()[0])

from generate import generate
from loaders.device import autocast, check_weights, pick_device
from loaders.runs import load_run
from loaders.tokenizer import decode_after, encoded


def main() -> None:
    cfg: SampleConfig = ARGS.sample
    device = pick_device(cfg.device)
    check_weights(ARGS.base.weights, device, cfg.dtype)
    run = load_run(ARGS.base.place(cfg.out_dir), device, **ARGS.base.options(cfg.out_dir))
    prompt = encoded(run.tokenizer, cfg.prompt)
    prompts = [prompt for _ in range(cfg.num_samples)]
    start = time.time()
    with autocast(device, cfg.dtype):
        rows, cache = generate(
            run.model,
            prompts,
            cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            seed=cfg.seed,
            stop=run.tokenizer.eot,
            prefill_tokens=cfg.prefill_tokens,
            compiled=cfg.compile,
        )
    seconds = time.time() - start
    for r in rows:
        print(cfg.prompt + decode_after(run.tokenizer, prompt, r))
        print("-" * 20)
    share = run.model.share_of_dense(cache.length * len(rows), cache)
    print(
        f"{sum(map(len, rows))} tokens in {seconds:.2f} s; the cache held {cache.nbytes():,} "
        f"bytes for {cache.length} tokens a row, "
        f"{share:.1%} of a dense one's where both have 16 bits for whole numbers",
        file=sys.stderr,
    )


if __name__ == "__main__":
    exit_on_bad_input(main)
