"""mixSGA: who takes a token, what is stored of it, and that masked and packed executions agree."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from helpers import read_in_pieces, tiny_model, tokens
from shared_head_models import EIGHT, SETTINGS, made

import mixsga
from baselines import shared_heads
from config import KVConfig, ModelConfig
from model import Transformer, apply_rope
from settings.experts import MixConfig
from training.loss import lm_loss

# ----------------------------------------------------------------------------- who takes a token


def choice_by_hand(scores, ratios, n_pad: int):
    """Equation 2, token by token: the best of the rest, as often as the expert has room."""
    T = len(scores)
    left = list(range(n_pad, len(scores)))
    out = {}
    n = T - n_pad
    for e, r in enumerate(ratios):
        room = len(left) if e == len(ratios) - 1 else min(len(left), math.ceil(r * n))
        for _ in range(room):
            best = max(left, key=lambda t: (scores[t][e].item(), -t))
            out[best] = e
            left.remove(best)
    return [out.get(t) for t in range(T)]


@pytest.mark.parametrize("T", [1, 2, 7, 30, 31])
@pytest.mark.parametrize("ratios", ["1", "3:1", "1:1:0", "3:1:6", "0:0:1", "1:2:3:4", "1:1:1"])
def test_expert_choice_equals_a_loop(T, ratios):
    """One expert a token, exact counts, ties to the earlier token, padding left out: odd lengths,
    one to four experts."""
    ratios = tuple(Fraction(int(p), sum(map(int, ratios.split(":")))) for p in ratios.split(":"))
    g = torch.Generator().manual_seed(T)
    scores = torch.randint(0, 4, (3, T, len(ratios)), generator=g).double()  # many ties
    n_pad = [0, T // 2, T - 1]
    valid = torch.arange(T) >= torch.tensor(n_pad)[:, None]
    got = mixsga.expert_choice(scores, ratios, valid)
    for b in range(3):
        want = choice_by_hand(scores[b], ratios, n_pad[b])
        assert got[b].tolist()[n_pad[b] :] == want[n_pad[b] :]
        counts = [want.count(e) for e in range(len(ratios))]
        assert sum(counts) == T - n_pad[b] and all(
            c == 0 for c, r in zip(counts, ratios, strict=True) if not r
        )


def test_counts_are_ceilings():
    """Of 31 tokens at 3:1:6: ceil(9.3), ceil(3.1) and the rest."""
    got = mixsga.expert_choice(
        torch.rand(1, 31, 3, generator=torch.Generator().manual_seed(0)),
        MixConfig().ratios,
        torch.ones(1, 31).bool(),
    )
    assert got[0].bincount(minlength=3).tolist() == [10, 4, 17]


def test_an_expert_of_share_0_is_never_chosen():
    """Neither by choice nor by score, whatever the router says."""
    model = made(expert_ratios="1:0:3")
    for p in mixsga.experts(model):
        p.router.bias.data = torch.tensor([0.0, 50.0, 0.0], dtype=torch.float64)
    cache = model.new_cache(2, 40)
    model.prefill(tokens(2, 20), cache)
    for i in range(4):
        model.decode(tokens(2, 1, seed=i), cache)
    for layer in cache.layers:
        assert layer.parts[1].n_packed.sum() == 0 and layer.parts[0].n_packed.sum() > 0


def test_the_random_router_keeps_the_shares():
    """Its scores' argmax falls on every expert as often as the ratios say, within three standard
    deviations."""
    path = mixsga.GroupedHeads(
        replace(EIGHT, block_size=20000), KVConfig(kv="mixsga"), MixConfig(expert_router="random")
    )
    share = path.noise.argmax(-1).bincount(minlength=3) / 20000
    assert (share - torch.tensor([0.3, 0.1, 0.6])).abs().max() < 3 * (0.24 / 20000) ** 0.5


# -------------------- what is stored and read


def test_keys_may_be_averaged_before_or_after_rope():
    """All heads of a token turn alike: the same keys."""
    model = tiny_model(cfg=EIGHT)
    attn = model.layers[0].self_attn
    x = torch.randn(2, 9, EIGHT.n_embd, dtype=torch.float64)
    cos = model.rope_cos[:9].double()
    sin = model.rope_sin[:9].double()
    _, k, _ = attn.project(x, cos, sin)
    before = (
        attn.k_proj.weight.view(4, 2, 16, -1).mean(1).flatten(0, 1),
        attn.k_proj.bias.view(4, 2, 16).mean(1).flatten(),
    )
    raw = torch.nn.functional.linear(x, *before).view(2, 9, 4, 16).transpose(1, 2)
    assert (mixsga.averaged(k, 2) - apply_rope(raw, cos, sin)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "setting",
    [
        dict(expert_ratios="1:0:0"),
        dict(group_sizes="1", expert_ratios="1"),
        dict(kv="gqa", kv_share=1.0),
        dict(kv="cla", kv_share=1.0),
    ],
)
def test_keeping_all_is_dense_exactly(setting):
    """1:0:0, one expert of size 1, GQA and CLA at a share of 1: the dense model's logits, without a
    cache and for a prompt with one."""
    model = made(**setting)
    dense = tiny_model(cfg=EIGHT)
    x = tokens(2, 33)
    assert torch.equal(model(x), dense(x))
    assert torch.equal(model.prefill(x, model.new_cache(2, 40), last_only=False), dense(x))
    model.train()
    assert torch.equal(model(x), dense(x))


def by_hand(model, x, index, tail):
    """Logits when token t's keys and values in layer l are averaged over its expert's groups once
    it is `tail` tokens old: one head, one token at a time."""

    def attend(i, q, k, v):
        sizes = mixsga.experts(model)[i].sizes
        whole_k = k
        whole_v = v
        k = k.clone()
        v = v.clone()
        for b in range(x.size(0)):
            for t in range(x.size(1)):
                size = sizes[index[i][b, t]]
                for h in range(0, 8, size):
                    k[b, h : h + size, t] = k[b, h : h + size, t].mean(0)
                    v[b, h : h + size, t] = v[b, h : h + size, t].mean(0)
        out = torch.zeros_like(q)
        for t in range(x.size(1)):
            old = max(0, t + 1 - tail)
            kt, vt = (
                torch.cat((a[:, :, :old], w[:, :, old : t + 1]), 2)
                for a, w in ((k, whole_k), (v, whole_v))
            )
            out[:, :, t] = ((q[:, :, t : t + 1] @ kt.mT / q.size(-1) ** 0.5).softmax(-1) @ vt)[
                :, :, 0
            ]
        return out

    h = model.embed_tokens(x)
    cos = model.rope_cos[: x.size(1)]
    sin = model.rope_sin[: x.size(1)]
    for i, block in enumerate(model.layers):
        _, q, k, v = block.before(h, cos, sin)
        h = block.after(h, attend(i, q, k, v))
    return model.lm_head(model.norm(h))


@pytest.mark.parametrize("tail", [0, 1, 4, 40])
@pytest.mark.parametrize("by", ["choice", "score"])
def test_masked_equals_a_loop(by, tail):
    """Logits equal those of averaging by hand what the recorded experts say, but for the newest
    tokens of every query."""
    model = made(tail=tail)
    x = tokens(2, 21)
    seen = []
    for p in mixsga.experts(model):
        p.chosen = lambda *a, f=p.chosen: (seen.append(f(*a)), seen[-1])[1]
    with shared_heads.routing(model, by):
        got = model(x)
    assert len(seen) == 2 and all(len(s.unique()) == 3 for s in seen)
    assert (got - by_hand(model, x, seen, tail)).abs().max() < 1e-10


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("pieces", [[26], [6] + [1] * 20, [9, 1, 1, 8, 7]])
def test_packed_equals_masked(name, pieces):
    """Through a cache, all at once, token by token or in pieces, with padding: the logits of decode
    mode without one."""
    model = made(**SETTINGS[name])
    x = tokens(2, 26)
    pad = torch.tensor([0, 5])
    with torch.no_grad(), shared_heads.routing(model, "score"):
        want = model(x, pad=pad)
        cache = model.new_cache(2, 26)
        got = read_in_pieces(model, x, cache, pieces, pad)
    assert cache.lengths.tolist() == [26, 21]
    for b in range(2):
        assert (got[b, pad[b] :] - want[b, pad[b] :]).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["3:1:6", "tail", "cla tail"])
def test_padding_in_a_later_piece_is_passed_over(name):
    """A piece after a prompt may be padded, too, by more than a token."""
    model = made(**SETTINGS[name])
    x = tokens(2, 26)
    pad = torch.tensor([3, 0])
    with torch.no_grad(), shared_heads.routing(model, "score"):
        cache = model.new_cache(2, 26)
        model.prefill(x[:, :20], cache)
        got = model.prefill(x[:, 20:], cache, pad)[:, 0]
        want = torch.stack(
            [model(torch.cat((x[b, :20], x[b, 20 + pad[b] :]))[None])[0, -1] for b in range(2)]
        )
    assert cache.lengths.tolist() == [23, 26]
    assert (got - want).abs().max() < 1e-10


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: the kernels read the experts' caches"
)
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-3), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize(
    "name", ["3:1:6", "two", "groups", "tail", "gqa tail", "cla tail", "groups tail"]
)
def test_packed_equals_masked_on_a_gpu(name, dtype, tol):
    """A prompt, then token by token: attention outputs of every layer through the cache are those
    of the masked one, by kernels, in float32 and bfloat16, relative to the largest."""
    model = made(**SETTINGS[name], dtype=torch.float32).cuda().to(dtype)
    T = 70
    g = torch.Generator().manual_seed(1)
    x, q, k, v = (
        torch.randn(*shape, generator=g).to("cuda", dtype)
        for shape in ((2, T, 40), (2, 8, T, 16), (2, 8, T, 16), (2, 8, T, 16))
    )
    paths = [block.self_attn.kv_path for block in model.layers]
    cache = model.new_cache(2, T, dtype)
    with torch.no_grad(), shared_heads.routing(model, "score"):
        want = [path(x, q, k, v) for path in paths]
        got = []
        for at in (slice(0, 40), *(slice(t, t + 1) for t in range(40, T))):
            new = (x[:, at], *(t[:, :, at] for t in (q, k, v)))
            got.append([])
            for path, layer in zip(paths, cache.layers, strict=True):
                verb = path.decode if at.start else path.prefill
                got[-1].append(verb(*new, layer))
    for i, w in enumerate(want):
        assert (torch.cat([piece[i] for piece in got], 2) - w).abs().max() < tol * w.abs().max()


def test_any_head_dimension_is_stored():
    """Without value groups nothing has to divide D but 2: heads of 6, default n_groups of 4."""
    model = made(cfg=replace(EIGHT, head_dim=6), tail=2)
    x = tokens(1, 15)
    with torch.no_grad(), shared_heads.routing(model, "score"):
        got = read_in_pieces(model, x, model.new_cache(1, 15), [9, 1, 1, 4])
        assert (got - model(x)).abs().max() < 1e-10


def test_packed_notices_a_wrong_expert():
    """The comparison above sees a cache that stores a token with another expert."""
    model = made()
    x = tokens(1, 12)
    with torch.no_grad(), shared_heads.routing(model, "score"):
        want = model(x)
        cache = model.new_cache(1, 12)
        model.prefill(x[:, :11], cache)
        part = max(cache.layers[0].parts, key=lambda p: int(p.n_packed))
        assert int(part.n_packed) > 1
        part.keys[1] = part.keys[0]
        assert (model.decode(x[:, 11:], cache)[:, -1] - want[:, -1]).abs().max() > 1e-6


def test_decoding_is_causal_and_rows_are_apart():
    """Decode mode: no logit depends on a later token or another row. Expert choice may look ahead;
    it does here."""
    model = made()
    x = tokens(2, 24)
    other = x.clone()
    other[:, 15:] = (other[:, 15:] + 1) % 53
    assert torch.equal(model(x)[:, :15], model(other)[:, :15])
    assert (model(x)[:1] - model(x[:1])).abs().max() < 1e-12
    with shared_heads.routing(model, "choice"):
        assert not torch.equal(model(x)[:, :15], model(other)[:, :15])


def test_a_prompt_is_chosen_and_what_follows_is_scored():
    """A prompt's experts have exact counts, those of the newest tokens included, which wait whole;
    a later token joins the expert that its score says, once it is no longer among the newest."""
    for tail in (0, 6):
        model = made(tail=tail)
        x = tokens(2, 21)
        cache = model.new_cache(2, 40)
        model.prefill(x, cache)
        for layer in cache.layers:
            counts = [
                (layer.window_index == e).sum((1, 2)) + part.n_packed
                for e, part in enumerate(layer.parts)
            ]
            assert [c.tolist() for c in counts] == [[7, 7], [3, 3], [11, 11]]
            assert layer.n_window.tolist() == [tail, tail]
        for i in range(3):
            model.decode(tokens(2, 1, seed=i), cache)
        for layer in cache.layers:
            assert layer.lengths.tolist() == [24, 24]
            assert sum(part.n_packed for part in layer.parts).tolist() == [24 - tail] * 2


def test_room_is_taken_kept_and_given_up():
    """What is reserved is there whoever takes the next tokens, and after a prompt has passed; fit
    gives up the rest, and the bytes are those of that many tokens in every expert."""
    model = made(tail=2)
    cache = model.new_cache(2, 40)
    cache.reserve(30)
    with torch.no_grad():
        model.prefill(tokens(2, 10), cache)
    assert all(10 <= layer.room <= 30 for layer in cache.layers)
    cache.fit(1)
    held = cache.nbytes()
    for layer in cache.layers:
        assert layer.room == 1
        assert [part.capacity - int(part.lengths.max()) for part in layer.parts] == [1, 1, 1]
    cache.reserve(30)
    assert cache.nbytes() > held
    cache.fit(1)
    assert cache.nbytes() == held


def test_scores_are_relative_to_their_running_mean():
    """Scores are the router's output less the mean so far (32 tokens of 0 beforehand, padding left
    out) plus the offset."""
    model = made()
    x = torch.randn(2, 9, EIGHT.n_embd, dtype=torch.float64)
    pad = torch.tensor([0, 4])
    path = mixsga.experts(model)[0]
    got = path.logits(x, pad)
    for b in range(2):
        for t in range(pad[b], 9):
            raw = x[b, pad[b] : t + 1] @ path.router.weight.T + path.router.bias
            assert (
                got[b, t] - (raw[-1] - raw.sum(0) / (len(raw) + 32) + path.offset)
            ).abs().max() < 1e-12


def test_the_opening_example_runs():
    """The lines that open mixsga.py, as they stand."""
    text = mixsga.__doc__.split("router per layer")[1].split("Two executions")[0]
    code = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    code = code[next(i for i, line in enumerate(code) if line.startswith("model = ")) :]
    idx, targets = tokens(2, 1, 12)
    names = {**vars(mixsga), "Transformer": Transformer, "lm_loss": lm_loss}
    names |= {"idx": idx, "targets": targets, "next_ids": idx[:, :1], "ModelConfig": ModelConfig}
    exec("\n".join(code), names)
    assert names["cache"].lengths.tolist() == [13] and names["loss"].isfinite()


# ----------------------------------------------------------------------------- training


@pytest.mark.parametrize("lm, weight", [(True, 0.0), (False, 0.5), (False, 0.0), (True, 0.5)])
def test_gradients_reach_the_router_by_the_intended_paths(lm, weight):
    """The language-model loss only with lm_to_experts, the consistency loss only with its weight;
    it moves nothing but routers."""
    model = made(lm_to_experts=lm, consistency_weight=weight)
    x = tokens(2, 20)
    model.train()
    loss = lm_loss(model(x), tokens(2, 20, seed=5))
    routers = [p.router.weight for p in mixsga.experts(model)]
    got = torch.autograd.grad(loss, routers, retain_graph=True, allow_unused=True)
    assert all((g is not None and g.abs().max() > 0) == lm for g in got)
    extra = model.kv_losses()["consistency"]
    named = dict(model.named_parameters())
    moved = torch.autograd.grad(extra, list(named.values()), allow_unused=True)
    # a bias is nearly its running mean
    touched = {
        n for n, g in zip(named, moved, strict=True) if g is not None and g.abs().max() > 1e-12
    }
    assert touched == ({n for n in named if "router" in n or "offset" in n} if weight else set())


def test_gradients_equal_central_differences():
    """Of the loss by keys' and values' weights (float64, experts held still), and of the router's
    scores: the change of a choice's weight."""
    model = made(consistency_weight=0.0)
    x = tokens(1, 11)
    y = tokens(1, 11, seed=4)
    model.train()
    held = {}
    for i, p in enumerate(mixsga.experts(model)):
        p.chosen = lambda *a, f=p.chosen, i=i: held.setdefault(i, f(*a))
    w = model.layers[0].self_attn.v_proj.weight
    (g,) = torch.autograd.grad(lm_loss(model(x), y), [w])
    for at in ((0, 0), (17, 3), (101, 20)):
        with torch.no_grad():
            w[at] += 1e-6
            up = lm_loss(model(x), y)
            w[at] -= 2e-6
            down = lm_loss(model(x), y)
            w[at] += 1e-6
        assert ((up - down) / 2e-6 - g[at]).abs() < 1e-6


def test_agreement_rises_with_the_consistency_loss():
    """Trained on it alone, the largest score becomes the choice for nearly all tokens; without it
    they agree less."""
    shares = []
    for weight in (1.0, 0.0):
        model = made(consistency_weight=weight, dtype=torch.float32)
        x = tokens(3, 40)
        model.train()
        opt = torch.optim.Adam([p for m in mixsga.experts(model) for p in m.parameters()], lr=0.05)
        for _ in range(80):
            opt.zero_grad()
            model(x)
            loss = model.kv_losses()["consistency"]
            loss.backward()
            opt.step()
        shares.append(torch.stack([p.agreement for p in mixsga.experts(model)]).mean().item())
    assert shares[0] > 0.95 > shares[1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(group_sizes="1,3", expert_ratios="1:1"), "n_kv_head=8"),
        (dict(group_sizes="1,2"), "2 numbers"),
        (dict(expert_ratios="0:0:0"), "not all 0"),
        (dict(expert_ratios="1:x:2"), "whole numbers"),
        (dict(kv_share=0.0), "(0, 1]"),
        (dict(expert_groups=5), "at most S"),
        (dict(consistency_weight=-1.0), "at least 0"),
        (dict(group_sizes="4,2,1"), "ascend"),
    ],
)
def test_refusals_are_one_line(flags, message):
    """Heads that no group divides, shares that are none: what came, what is allowed, what to do."""
    with pytest.raises(ValueError) as e:
        shared_heads.attach(tiny_model(cfg=EIGHT), KVConfig(kv="mixsga"), MixConfig(**flags))
    assert message in str(e.value) and "\n" not in str(e.value)
