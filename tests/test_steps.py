"""Decoding: prompts in pieces, caches joined, and DecodeGraph, which must give what the model's own
decode gives.

On a GPU steps are CUDA graphs; without one their kernels run in Triton's interpreter,
uncaptured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import STORED_GROUPS, TINY, grouped_model, randomise, tiny_model, tokens

import kernels
import kv_router
import lora
import mixsga
import selector
from baselines import shared_heads
from config import KVConfig, ModelConfig, SelectConfig
from generate import DecodeGraph, generate, prefill
from model import Transformer
from settings.adapters import AdapterConfig
from settings.experts import MixConfig
from storage import dense as dense_cache
from storage import packed as packed_cache
from storage.as_dense import as_dense
from storage.cache import KVCache, NewTokens
from storage.kernel_base import triton
from storage.ragged import RaggedCache

CUDA = torch.cuda.is_available()
T = 37 if CUDA else 11  # tokens of a prompt: the interpreter is slow
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")]
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = pytest.mark.skipif(triton is None, reason="graphs need triton")

STORED = {"dense": None, **STORED_GROUPS, "MoE-LoRA": None}
# the slow way, too
INTERPRETED = (
    "dense",
    "MoE-LoRA",
    "norm",
    "blocks",
    "linear",
    "trained maps",
    "select",
    "int4",
    "select, levels",
    "mixSGA",
    "mixSGA, no tail",
)
SELECTED = {
    "select": dict(mask_scope="head"),
    "select, one mask": dict(mask_scope="shared"),
    "select, int4": dict(mask_scope="head", key_bits=4, value_bits=4, key_block=16),
    "select, levels": dict(mask_scope="head", key_block=16),
}
EXPERTS = {
    "mixSGA": (KVConfig(kv="mixsga", kv_tail=3), MixConfig()),
    "mixSGA, no tail": (KVConfig(kv="mixsga", kv_tail=0), MixConfig(expert_groups=2)),
    "GQA": (KVConfig(kv="gqa", kv_tail=5), MixConfig()),
}
EVERY = (*STORED, *SELECTED, *EXPERTS)


def made(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A small folded model that stores as STORED, SELECTED or EXPERTS say."""
    if name in EXPERTS:
        cfg = replace(TINY, n_head=8, n_kv_head=8)
        model = shared_heads.attach(tiny_model(dtype=dtype, cfg=cfg), *EXPERTS[name])
        torch.manual_seed(7)
        for path in mixsga.experts(model):
            if path.router is not None:
                torch.nn.init.normal_(path.router.weight)
                torch.nn.init.normal_(path.offset, std=0.3)
        return model.to(DEVICE)
    if name in SELECTED:
        kv = KVConfig(kv="select", n_groups=4, kv_tail=5, **SELECTED[name])
        budget = dict(kv_bytes=0.8) if "levels" in name else dict(kv_keep=0.5)
        cfg = SelectConfig(**budget, relevance="future", readers=20, past=16)
        return kv_router.fold(
            selector.attach(tiny_model(dtype=dtype), kv, cfg, [tokens(2, 70, seed=1)])
        ).to(DEVICE)
    setting = STORED[name]
    model = tiny_model(dtype=dtype) if setting is None else grouped_model(dtype=dtype, **setting)
    if name == "MoE-LoRA":  # routers that run ahead of the projections
        randomise(
            lora.attach(
                model,
                AdapterConfig(
                    adapter="moe_lora", lora_targets="q,v,gate,down", r=2, experts=3, expert_topk=2
                ),
            )
        ).eval()
    return model.to(DEVICE)


class ByKernel:
    """Lets models decode by kernels: on a CPU in Triton's interpreter, uncaptured. `with` it: by the
    references."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.on = True
        patch.setattr(kernels, "use_triton", self.use_triton)
        patch.setattr(dense_cache, "use_triton", self.use_triton)
        patch.setattr(packed_cache, "use_triton", self.use_triton)
        if not CUDA:
            patch.setattr(DecodeGraph, "possible", staticmethod(self.possible))
            patch.setattr(DecodeGraph, "next", self.next)

    def use_triton(self, impl: str, *about) -> bool:  # models are float32
        return self.on and impl != "torch"

    @staticmethod
    def possible(model: Transformer) -> bool:
        return all(block.self_attn.kv_path.graph_safe() for block in model.layers)

    @staticmethod
    @torch.no_grad()
    def next(graph: DecodeGraph) -> torch.Tensor:
        graph._once()
        graph.cache.length += 1
        return graph.idx

    def __enter__(self) -> None:
        self.on = False

    def __exit__(self, *args) -> None:
        self.on = True


@pytest.fixture
def plainly(monkeypatch):
    """Caches are made for kernels, and read by them; `with plainly:` those made and read inside
    take the references."""
    return ByKernel(monkeypatch)


@pytest.mark.parametrize(
    "name", [n if n in INTERPRETED else pytest.param(n, marks=GPU) for n in EVERY]
)
def test_steps_give_what_decode_gives(name, plainly, monkeypatch):
    """Logits of every step equal those of decode on a cache of its own, over windows that fill and
    blocks that are packed, with padding; then both caches hold the same, and prefill goes on from
    either with the same logits."""
    ints = "int" in name or "levels" in name
    model = made(name)
    x = tokens(2, 45 if ints else T).to(DEVICE)
    short = 4 if name == "blocks" else 3
    n = 9 if CUDA else short
    pad = torch.tensor([0, 6], device=DEVICE)
    follow = tokens(2, n + 2, seed=5).to(DEVICE)
    seen: list[torch.Tensor] = []

    def pick(logits, step):
        seen.append(logits.clone())
        return follow.index_select(1, step)

    with torch.no_grad():
        with plainly:
            _, a = prefill(model, x, x.size(1) + n + 3, pad)
            want = [model.decode(follow[:, i : i + 1], a)[:, -1] for i in range(n)]
        _, b = prefill(model, x, x.size(1) + n + 3, pad)
        assert not ints or all(c.n_packed.any() for c in b.layers)
        monkeypatch.setattr(DecodeGraph, "WARM", n)  # never captured: pick keeps what it sees
        graph = DecodeGraph(model, b, follow[:, :1], pick, n)
        for _ in range(n):
            graph.next()
        scale = torch.stack(want).abs().max()
        assert len(seen) == n
        assert (torch.stack(seen) - torch.stack(want)).abs().max() < 2e-4 * scale
        assert a.length == b.length == x.size(1) + n
        assert torch.equal(a.lengths, b.lengths)
        for one, other in zip(a.layers, b.layers, strict=True):
            assert one.settings() == other.settings()
            if name in EXPERTS:  # capacities grow as tokens come, or are reserved
                for part, same in zip(one.parts, other.parts, strict=True):
                    assert torch.equal(part.lengths, same.lengths)
                    for t, u in zip(as_dense(part), as_dense(same), strict=True):
                        assert torch.allclose(t.float(), u.float(), atol=2e-3, rtol=2e-3)
                continue
            held = other.state_dict()
            for key, t in one.state_dict().items():
                if t.is_floating_point():
                    assert torch.allclose(t, held[key], atol=2e-3, rtol=2e-3), key
                else:
                    assert torch.equal(t, held[key]), key
        with plainly:
            last = [model.prefill(follow[:, n:], c, last_only=False) for c in (a, b)]
        assert (last[0] - last[1]).abs().max() < 2e-4 * scale


def test_steps_notice_a_wrong_append(plainly, monkeypatch):
    """The comparison above sees a step that packs another group."""
    right = packed_cache.append_packed

    def wrong(packed, window, bits, n_packed, n_window, k, v, *rest, **kw):
        right(packed, window, bits, n_packed, n_window, k, v.roll(1, -1), *rest, **kw)

    monkeypatch.setattr(packed_cache, "append_packed", wrong)
    with pytest.raises(AssertionError):
        test_steps_give_what_decode_gives("norm", plainly, monkeypatch)


@pytest.mark.parametrize("name", ["dense", "norm", "select"])
def test_generate_by_steps_gives_the_same_tokens(name, plainly, monkeypatch):
    """Greedy and sampled, prompts of different lengths, with a token that stops a row: the same
    tokens as by decode."""
    model = made(name)
    prompts = [tokens(n, seed=n).tolist() for n in (7, 10)]
    n = 14 if CUDA else 4
    kinds = [dict(), dict(temperature=0.8, top_k=20, top_p=0.9, seed=3)]
    stepped = [generate(model, prompts, n, **kw)[0] for kw in kinds]
    stop = stepped[0][0][2]
    stepped.append(generate(model, prompts, n, stop=stop)[0])
    monkeypatch.setattr(DecodeGraph, "possible", staticmethod(lambda m: False))
    with plainly:
        assert [generate(model, prompts, n, **kw)[0] for kw in kinds] == stepped[:2]
        assert generate(model, prompts, n, stop=stop)[0] == stepped[2]
    assert len(stepped[2][0]) <= 2


# ----------------------------------------------------------------------------- prompts in pieces


@pytest.mark.parametrize("name", ["dense", "norm", "blocks", "select", "select, one mask"])
def test_rows_at_a_time_change_nothing(name):
    """Two rows at a time, then one: logits and the joined cache decode as if all rows had been read
    together."""
    model = made(name, torch.float32 if CUDA else torch.float64)
    x = tokens(5, 41).to(DEVICE)
    pad = torch.tensor([0, 7, 0, 40, 2], device=DEVICE)
    want, whole = prefill(model, x, 60, pad)
    for at_once in (2 * 41 + 5, 41):
        got, parts = prefill(model, x, 60, pad, at_once)
        assert parts.length == whole.length == 41
        assert parts.lengths.tolist() == whole.lengths.tolist() == (41 - pad).tolist()
        follow = tokens(5, 6, seed=8).to(DEVICE)
        scale = want.abs().max()
        tolerance = 1e-9 if got.dtype == torch.float64 else 2e-3
        assert (got - want).abs().max() < tolerance * scale
        with torch.no_grad():
            for i in range(6):
                a = model.decode(follow[:, i : i + 1], whole)
                b = model.decode(follow[:, i : i + 1], parts)
                assert (a - b).abs().max() < tolerance * scale
        whole = prefill(model, x, 60, pad)[1]


def test_a_prompt_in_pieces_reads_itself_whole_and_what_came_before_as_stored():
    """at_once below the prompt's length: the same as prefilling piece by piece; without compression
    the same as in one piece."""
    x = tokens(2, 50).to(DEVICE)
    for name in ("dense", "norm", "linear"):
        model = made(name, torch.float32 if CUDA else torch.float64)
        got, _ = prefill(model, x, 60, None, 13)
        rows = []
        for row in x:
            cache = model.new_cache(1, 60)
            with torch.no_grad():
                pieces = [model.prefill(piece, cache)[:, -1] for piece in row[None].split(13, 1)]
            rows.append(pieces[-1])
        want = torch.cat(rows)
        tolerance = 2e-3 if CUDA else 1e-9
        assert (got - want).abs().max() < tolerance * want.abs().max()
        whole = prefill(model, x, 60)[0]
        near = 2e-3 if CUDA else 1e-6
        assert bool((got - whole).abs().max() < near * whole.abs().max()) == (name == "dense")


def test_a_selecting_storage_gets_whole_prompts():
    """It looks at a whole prompt, so a budget below one prompt means one row at a time."""
    model = made("select")
    x = tokens(3, 41).to(DEVICE)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[:2])))
    prefill(model, x, 50, None, 10)
    assert seen == [(1, 41)] * 3


@pytest.mark.parametrize("dropped", [True, False])
def test_joined_selected_caches_keep_sequences(dropped):
    """select_sequences of a join gives back each part, whether or not one part dropped no token;
    both truncate to what lies before the window."""
    g = torch.Generator().manual_seed(0)
    parts = []
    for b, share in ((2, 0.6), (1, 1.0 if not dropped else 0.3), (1, 1.0)):
        k, z = torch.randn(2, b, 3, 90, 16, generator=g)
        keep = torch.rand(b, 3, 90, generator=g) < share
        mask = torch.rand(b, 3, 90, 4, generator=g) < 0.5
        c = RaggedCache(b, 100, 3, 16, 4, 3, k)
        c.pack(k, z, keep, mask, torch.ones(b, 90, dtype=torch.bool))
        new_k, new_v = torch.randn(2, b, 3, 4, 16, generator=g)
        c.append(NewTokens(new_k, new_v, None))
        parts.append(c)
    joined = RaggedCache.cat(parts)
    assert joined.batch == 4
    assert joined.lengths.tolist() == [94] * 4
    assert joined.longest == max(c.longest for c in parts)

    def shown(cache: RaggedCache) -> list[torch.Tensor]:
        view = cache.view()
        width = int(view.window.count.max())
        return [*view.packed[0].unpack(), *view.window.aligned(width), view.window.count]

    for rows, part in (([0, 1], parts[0]), ([2], parts[1]), ([3], parts[2])):
        again = joined.select_sequences(rows)
        for n in (94, 90):
            part.truncate(n)
            again.truncate(n)
            assert all(torch.equal(a, b) for a, b in zip(shown(again), shown(part), strict=True))


def test_cat_of_one_cache_is_that_cache_and_saves_like_any(tmp_path):
    """KVCache.cat([c]) is c; a joined cache is saved and loaded, and decodes on."""
    model = made("norm", torch.float64 if not CUDA else torch.float32)
    x = tokens(4, 30).to(DEVICE)
    _, one = prefill(model, x, 40)
    assert KVCache.cat([one]) is one
    _, joined = prefill(model, x, 40, None, 30)
    joined.save(tmp_path / "cache")
    loaded = KVCache.load(tmp_path / "cache", model)
    with torch.no_grad():
        assert torch.equal(model.decode(x[:, :1], loaded), model.decode(x[:, :1], joined))


def test_generate_refuses_a_negative_budget():
    """One line: what came and what is allowed."""
    with pytest.raises(ValueError, match="prefill_tokens=-1"):
        generate(made("dense"), [[1, 2]], 3, prefill_tokens=-1)


# ----------------------------------------------------------------------------- on a GPU


@pytest.mark.parametrize("name", [pytest.param(n, marks=GPU) for n in EVERY])
def test_graphs_and_compilation_give_the_same_tokens(name, monkeypatch):
    """CUDA graphs, with torch.compile too, against decode without them: the same greedy tokens for
    a batch with padding, float32."""
    model = made(name)
    prompts = [tokens(n, seed=n).tolist() for n in (60, 33)]
    got = [
        generate(model, prompts, 30, compiled=c)[0]
        for c in ((False, True) if name == "norm" else (False,))
    ]
    monkeypatch.setattr(DecodeGraph, "possible", staticmethod(lambda m: False))
    want = generate(model, prompts, 30)[0]
    assert all(g == want for g in got)


@pytest.mark.parametrize("groups", [pytest.param(16, marks=GPU)])
def test_a_long_prompt_needs_one_chunk_of_whole_values_beyond_the_cache(groups):
    """Peak memory of a prefill in pieces of 512 tokens, weights aside: the packed cache, and what
    512 tokens take in a pass of their own (measured), twice over; reading all at once takes several
    times that."""
    cfg = ModelConfig(
        vocab_size=101,
        block_size=16384,
        n_layer=4,
        n_embd=256,
        n_head=8,
        n_kv_head=8,
        head_dim=64,
        n_inner=512,
    )
    model = randomise(Transformer(cfg), 0.05).to(DEVICE, torch.bfloat16).eval()
    kv = KVConfig(n_groups=groups, topk_groups=groups // 2, value_basis="native", kv_tail=16)
    kv_router.fold(kv_router.attach(model, kv, None))
    x = tokens(1, 16000, vocab=101).to(DEVICE)

    def peak(n: int, at_once: int) -> tuple[int, int]:
        prefill(model, x[:, :1024], 16100, None, at_once)  # kernels are built
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, cache = prefill(model, x[:, :n], 16100, None, at_once)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, cache.nbytes()

    alone, held = peak(512, 512)
    pieces, _ = peak(16000, 512)
    whole, _ = peak(16000, 0)
    assert pieces < held + 2 * (alone - held) + 2**20 * 8 and whole > 2 * pieces - held
