"""Steps of PEFT's LoRA over transformers' Llama, eager and compiled: what benchmarks/step.py stands
beside. It imports nothing of this project, so that kernels.py hides no package of that name:

    python -P benchmarks/peft_step.py '{"n_layer": 30, ...}'

The argument is a model's shape (config.py's names) with batch_size, steps, device, dtype, and
compiled: a list of false (eager) and true. Prints one JSON row a line. ValueError where a trained
parameter has no gradient or one of zeros.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def peft_model(asked: dict) -> torch.nn.Module:
    """Return a model of random weights with LoRA of rank 8 on the attention's projections."""
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
        model = LlamaForCausalLM(config)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS
    )
    return get_peft_model(model, lora).to(asked["device"]).train()


def measured(asked: dict, compiled: bool) -> dict:
    """Train for asked["steps"] steps; return the row."""
    device = torch.device(asked["device"])
    on_gpu = device.type == "cuda"
    model = peft_model(asked)
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=3e-4, fused=on_gpu)
    run = torch.compile(model) if compiled else model
    shape = (asked["batch_size"], asked["block_size"])
    x = torch.randint(0, asked["vocab_size"], shape, device=device)

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        with torch.autocast(device.type, getattr(torch, asked["dtype"])):
            loss = run(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        loss.item()  # which a loop that logs its loss waits for

    seconds = []
    for _ in range(asked["steps"]):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    # the first step moves B alone, which begins as zeros and makes A's gradient zero
    for name, p in model.named_parameters():
        if p.requires_grad and (p.grad is None or not p.grad.any()):
            raise ValueError(f"{name} has no gradient after {asked['steps']} steps")
    took = median(seconds[asked["steps"] // 4 :])
    return {
        "name": "LoRA",
        "impl": "PEFT, compiled" if compiled else "PEFT, eager",
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "ms": round(1e3 * took, 2),
        "tokens_per_s": round(x.numel() / took),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "first_step_s": round(seconds[0], 2),
    }


def main() -> None:
    asked = json.loads(sys.argv[1])
    for compiled in asked["compiled"]:
        if asked["device"] != "cpu":
            torch.cuda.reset_peak_memory_stats(asked["device"])
        print(json.dumps(measured(asked, compiled)), flush=True)


if __name__ == "__main__":
    main()
