"""What our times stand beside, over transformers' Llama of random weights: steps of PEFT's LoRA,
eager and compiled, and transformers' generate. It imports nothing of this project, so that
kernels.py hides no package of that name:

    python -P benchmarks/peers.py '{"n_layer": 30, ...}'

The argument is a model's shape (config.py's names) with device, dtype, `lora`, a list of steps to
time: [sequences, tokens of each, steps, compiled], and `generate`, a list of decodings to time:
[sequences, tokens of a prompt, new tokens]. Prints one JSON row a line. ValueError where a trained
parameter has no gradient or one of zeros.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
WARM = 2  # new tokens that are not counted


def llama(asked: dict) -> LlamaForCausalLM:
    """Return a model of random weights, made on the device."""
    config = LlamaConfig(
        vocab_size=asked["vocab_size"],
        hidden_size=asked["n_embd"],
        intermediate_size=asked["n_inner"],
        num_hidden_layers=asked["n_layer"],
        num_attention_heads=asked["n_head"],
        num_key_value_heads=asked["n_kv_head"],
        head_dim=asked["head_dim"],
        max_position_embeddings=asked["block_size"],
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(asked["device"]):
        return LlamaForCausalLM(config)


def row_of(asked: dict, name: str, impl: str, seconds: float, tokens: int) -> dict:
    """Return the row of something that takes so many seconds for so many tokens."""
    device = torch.device(asked["device"])
    on_gpu = device.type == "cuda"
    return {
        "name": name,
        "impl": impl,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "ms": round(1e3 * seconds, 4),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }


# -------------------- LoRA


def peft_model(asked: dict) -> torch.nn.Module:
    """Return a model with LoRA of rank 8 on the attention's projections."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS
    )
    return get_peft_model(llama(asked), lora).to(asked["device"]).train()


def lora_steps(asked: dict, batch_size: int, n_tokens: int, steps: int, compiled: bool) -> dict:
    """Train for so many steps; return the row."""
    device = torch.device(asked["device"])
    model = peft_model(asked)
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=3e-4, fused=device.type == "cuda")
    run = torch.compile(model) if compiled else model
    x = torch.randint(0, asked["vocab_size"], (batch_size, n_tokens), device=device)

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        with torch.autocast(device.type, getattr(torch, asked["dtype"])):
            loss = run(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        loss.item()  # which a loop that logs its loss waits for

    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    # the first step moves B alone, which begins as zeros and makes A's gradient zero
    for name, p in model.named_parameters():
        if p.requires_grad and (p.grad is None or not p.grad.any()):
            raise ValueError(f"{name} has no gradient after {steps} steps")
    took = median(seconds[steps // 4 :])
    impl = "PEFT, compiled" if compiled else "PEFT, eager"
    row = row_of(asked, "LoRA", impl, took, x.numel())
    row["first_step_s"] = round(seconds[0], 2)
    return row | {"batch_size": batch_size, "n_tokens": n_tokens}


# -------------------- generation


class Clock:
    """A logits processor that changes nothing and notes when each new token is chosen."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


def generation(
    asked: dict, model: LlamaForCausalLM, batch_size: int, n_tokens: int, n_new: int
) -> dict:
    """Continue prompts greedily by generate; return the row of one token of every sequence."""
    shape = (batch_size, n_tokens)
    ids = torch.randint(0, asked["vocab_size"], shape, device=asked["device"])
    clock = Clock()
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_new,
            do_sample=False,
            use_cache=True,
            logits_processor=[clock],
        )
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    row = row_of(asked, "decode", "transformers generate", median(seconds[WARM:]), batch_size)
    row["prefill_s"] = round(clock.times[0] - start, 3)
    return row | {"batch_size": batch_size, "n_tokens": n_tokens}


def generating_model(asked: dict) -> LlamaForCausalLM:
    """Return a model whose weights have the dtype that is computed in, and that never stops."""
    model = llama(asked).to(getattr(torch, asked["dtype"])).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def main() -> None:
    asked = json.loads(sys.argv[1])
    on_gpu = asked["device"] != "cpu"
    for case in asked.get("lora", []):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(asked["device"])
        print(json.dumps(lora_steps(asked, *case)), flush=True)
    if not asked.get("generate"):
        return
    model = generating_model(asked)
    for case in asked["generate"]:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(asked["device"])
        print(json.dumps(generation(asked, model, *case)), flush=True)


if __name__ == "__main__":
    main()
