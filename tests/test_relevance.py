"""Every relevance signal against loops over tokens, heads and queries; the trained ones against
their features, losses and symmetries by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import TINY, randomise

from config import SelectConfig
from model import apply_rope, rope_table
from selection import relevance
from selection.budgets import row_budgets
from selection.predictors import HiddenPredictor, QueryPredictor
from selection.relevance import Prompt, beside
from selector import WITHOUT_TRAINING
from storage.kernel_base import triton
from storage.layout import soft_cap

L = 2
H = TINY.n_head
HKV = TINY.n_kv_head
D = TINY.head_dim
E = TINY.n_embd
S = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAD = (0, 21, 85)  # the last row is shorter than the query region
CLOSE = dict(rtol=2e-5, atol=2e-6)  # scores are float32
KERNEL = pytest.param(
    "triton", marks=pytest.mark.skipif(triton is None, reason="the kernels need triton")
)
CFG = SelectConfig(past=7, ahead=5, token_keep=0.3, pool=5)
TRAINED = (
    "predictor-mse",
    "predictor-kl",
    "expected_attention-mse",
    "expected_attention-kl",
    "predictor_query",
)
DEPTH_FREE = [*sorted(WITHOUT_TRAINING), *TRAINED]


def turned(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """x (B, h, T, D) rotated pair by pair at position (B, T), in float64."""
    freq = TINY.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = position.double()[:, None, :, None] * freq  # (B, 1, T, D/2)
    a, b = x.double().chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def prompt_of(
    pad=(0, 0, 0), C: int = 80, W: int = 11, seed: int = 0, **kw
) -> tuple[Prompt, torch.Tensor]:
    """A random prompt and its queries before RoPE (L, B, H, T, D). Keys are large, so that
    attention is far from even."""
    g = torch.Generator().manual_seed(seed)
    B = len(pad)
    T = C + W
    x = torch.randn(L, B, T, E, generator=g, dtype=torch.float64)
    q, k = (torch.randn(L, B, h, T, D, generator=g, dtype=torch.float64) * 1.5 for h in (H, HKV))
    z = torch.randn(L, B, HKV, C, D, generator=g, dtype=torch.float64)
    alpha = torch.rand(L, B, HKV, C, generator=g)
    position = (torch.arange(T) - torch.tensor(pad)[:, None]).clamp_min(0)
    pads = torch.tensor(pad) if any(pad) else None
    rotated = [[turned(t, position) for t in s] for s in (q, k)]
    return Prompt(list(x), *rotated, list(z), C, pads, rope_table(TINY), alpha, **kw), q


def row_of(p: Prompt, b: int) -> Prompt | None:
    """Row b alone, without its padding; None where it has no context."""
    n = int(p.pad[b]) if p.pad is not None else 0
    if n >= p.n_context:
        return None
    return Prompt(
        [x[b : b + 1, n:] for x in p.x],
        [q[b : b + 1, :, n:] for q in p.q],
        [k[b : b + 1, :, n:] for k in p.k],
        [z[b : b + 1, :, n:] for z in p.z],
        p.n_context - n,
        None,
        p.rope,
        p.oracle[:, b : b + 1, :, n:],
        observers=p.observers,
    )


def layer_of(p: Prompt, i: int) -> Prompt:
    """Layer i alone, as a routed prefill sees it."""
    return Prompt(
        [p.x[i]],
        [p.q[i]],
        [p.k[i]],
        [p.z[i]],
        p.n_context,
        p.pad,
        p.rope,
        p.oracle[i : i + 1],
        first=i,
    )


def attention(
    p: Prompt, readers: list[int], q=None, causal: bool = True, total: bool = False
) -> torch.Tensor:
    """Attention that the columns `readers` give each context token: a mean over those that are no
    padding and over the query heads of a KV head (a sum over readers with `total`), softmax by
    softmax. q (L, B, H, len(readers), D): other queries in their place."""
    B = len(p.k[0])
    n = H // HKV
    out = torch.zeros(L, B, HKV, p.n_context, dtype=torch.float64)
    for i in range(L):
        for b in range(B):
            first = 0 if p.pad is None else int(p.pad[b])
            real = [r for r in readers if r >= first]
            for r in real if first < p.n_context else ():
                last = r + 1 if causal else p.T
                for h in range(H):
                    query = p.q[i][b, h, r] if q is None else q[i, b, h, readers.index(r)]
                    logits = torch.stack(
                        [query.double() @ p.k[i][b, h // n, j].double() for j in range(first, last)]
                    ) / math.sqrt(D)
                    share = (logits - logits.max()).exp()
                    share = (share / share.sum())[: max(0, p.n_context - first)]
                    out[i, b, h // n, first : first + len(share)] += (
                        share / n / (1 if total else len(real))
                    )
    return out


def largest(p: Prompt, readers: list[int]) -> torch.Tensor:
    """The largest attention that one of the columns `readers` and one query head gives each context
    token."""
    n = H // HKV
    of_each = []
    for r in readers:
        for head in range(n):  # one of a KV head's: its query in the place of all of them
            q = torch.stack([t[:, head::n, r : r + 1].repeat_interleave(n, 1) for t in p.q])
            of_each.append(attention(p, [r], q))
    return torch.stack(of_each).amax(0)


def widest(a: torch.Tensor, p: Prompt, width: int) -> torch.Tensor:
    """Maximum over the real neighbours within width // 2, loops; zero for padding."""
    out = torch.zeros_like(a)
    for b in range(a.size(1)):
        first = 0 if p.pad is None else int(p.pad[b])
        for t in range(first, p.n_context):
            out[:, b, :, t] = a[:, b, :, max(first, t - width // 2) : t + width // 2 + 1].amax(-1)
    return out


def on_real(a: torch.Tensor, p: Prompt) -> torch.Tensor:
    """Scores (L or 1, B, Hkv or 1, C) at (L, B, Hkv, C), zero at padding, float64."""
    return (a.double() * p.valid[None, :, None]).expand(L, -1, HKV, -1)


def past_columns(C: int, past: int) -> list[int]:
    """The columns of the past queries of a context without padding: evenly spread over its last
    1,024 tokens, from the last."""
    n = min(past, C)
    return [C - 1 - i * (min(relevance.SPAN, C) // n) for i in range(n)]


# -------------------- signals without parameters


@pytest.mark.parametrize("observers", [0, 4, 30, 200])
@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_observed_is_the_mean_attention_of_the_asking_tokens(pad, observers):
    """Softmax by softmax over what each query may see, padding left out, of the query region or of
    fewer or more tokens; pooling is a maximum over real neighbours, none with pool=1."""
    p, _ = prompt_of(pad, observers=observers)
    asking = range(max(0, p.T - observers) if observers else p.n_context, p.T)
    want = attention(p, list(asking))
    torch.testing.assert_close(p.observed.double(), want, **CLOSE)
    for pool in (1, 5):
        got = on_real(relevance.observed(p, dataclasses.replace(CFG, pool=pool)), p)
        torch.testing.assert_close(got, widest(want, p, pool), **CLOSE)
    assert p.observed.dtype == torch.float32


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("impl", ["torch", KERNEL])
def test_attention_follows_visibility_and_weights(impl, cap, monkeypatch):
    """Any last column that a query reads and any weight per query and row enter the mean as stated,
    what has no weight is no part of the largest share, and layers taken in several steps give the
    same; kernels and plain form alike, logits bent or not."""
    p, _ = prompt_of(PAD, impl=impl, cap=cap)
    device = "cpu"
    if impl == "triton":  # no kernel takes float64
        device = "cuda" if torch.cuda.is_available() else "cpu"
        single = {name: [t.float().to(device) for t in getattr(p, name)] for name in ("q", "k")}
        p = dataclasses.replace(p, pad=p.pad.to(device), **single)
    readers = [33, 50, 84, 90]
    last = [61, 86, 87, 90]
    weight = torch.rand(3, len(readers), generator=torch.Generator().manual_seed(4))
    weight[1, 0] = 0  # padding in that row
    weight[2, :3] = 0
    want = torch.zeros(2, L, 3, HKV, p.n_context, dtype=torch.float64)
    for i in range(L):
        for b in range(2):  # the third has no context
            for w, r, end in zip(
                (weight[b] / weight[b].sum()).tolist(), readers, last, strict=True
            ):
                seen = range(int(p.pad[b]), end + 1)
                for h in range(H):
                    logits = torch.stack([p.q[i][b, h, r] @ p.k[i][b, h // 2, j] for j in seen])
                    share = soft_cap(logits.double() / math.sqrt(D), cap).softmax(0)
                    for s, j in zip(share.tolist(), seen, strict=True):
                        if j < p.n_context:
                            mean, most = want[:, i, b, h // 2]
                            mean[j] += w * s / (H // HKV)
                            most[j] = max(most[j], s * (w > 0))
    queries = p.queries(torch.tensor(readers, device=device))
    weight = weight.to(device)
    args = (queries, torch.tensor(last, device=device), weight)
    got = p.received(*args, with_largest=True)
    torch.testing.assert_close(torch.stack(got).double().cpu(), want, **CLOSE)
    monkeypatch.setattr(relevance, "CHUNK", 1)
    again = p.received(*args, with_largest=True)
    assert torch.equal(torch.stack(again), torch.stack(got))
    everything = torch.full((4,), p.T - 1, device=device)
    ours, all_read = (p.received(queries, end, weight)[0] for end in (None, everything))
    torch.testing.assert_close(ours[:, :2], all_read[:, :2])


@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_moved_queries_are_those_of_the_new_position(pad):
    """Turning a rotated query on equals rotating the raw one where it is moved to: `ahead` after
    the prompt's last position, by row. None is moved past the model's context."""
    p, raw = prompt_of(pad)
    columns = torch.tensor([79, 64, 40, 7])
    start = torch.tensor(pad)[:, None]
    real = (columns >= start)[:, None, :, None]  # (B, 1, Q, 1)
    for ahead in (0, 5, 60, 200):
        at = (p.T - start + ahead).clamp_max(TINY.block_size - 1).expand(-1, len(columns))
        want = torch.stack([turned(raw[i][:, :, columns], at) for i in range(L)])
        torch.testing.assert_close(
            p.moved(columns, ahead).double() * real, want * real, rtol=1e-5, atol=5e-5
        )


def in_float32(p: Prompt) -> Prompt:
    """A prompt as kernels take it: in 32 bits, where they run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seen = {name: [t.float().to(device) for t in getattr(p, name)] for name in "xqkz"}
    pad = None if p.pad is None else p.pad.to(device)
    rope = tuple(t.to(device) for t in p.rope)
    return dataclasses.replace(p, impl="triton", pad=pad, rope=rope, **seen)


@pytest.mark.parametrize("impl", ["torch", KERNEL])
@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_moments_are_of_queries_to_come(pad, impl, monkeypatch):
    """Query by query from their raw form, the last SPAN of a row, each rotated where one of the
    READ tokens to come stands, none past the context; every row as if alone."""
    p, raw = prompt_of(pad)
    monkeypatch.setattr(relevance, "SPAN", 30)
    if impl == "triton":  # which knows 32 bits alone
        p = in_float32(p)
    got = p.moments().cpu()
    assert got.dtype == torch.float64
    D = TINY.head_dim
    n = TINY.n_head // TINY.n_kv_head
    for i in range(L):
        for b in range(len(pad)):
            for h in range(TINY.n_kv_head):
                want = torch.zeros(D, D, dtype=torch.float64)
                seen = 0
                for back in range(min(30, p.T - pad[b])):
                    length = p.T - pad[b]
                    at = length + int(
                        back * relevance.GOLDEN % 1 * min(relevance.READ, TINY.block_size - length)
                    )
                    for head in range(h * n, h * n + n):
                        q = turned(
                            raw[i][b : b + 1, head : head + 1, p.T - 1 - back : p.T - back],
                            torch.tensor([[at]]),
                        )[0, 0, 0]
                        want = want + torch.outer(q, q)
                        seen = seen + 1
                torch.testing.assert_close(got[i][b, h], want / seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("past", "C"), [(7, 80), (80, 80), (200, 33), (1, 17)], ids=lambda n: str(n)
)
def test_past_and_future_are_attention_of_queries_moved_ahead(past, C):
    """Past queries, evenly spread and the last among them, rotated at the new position from their
    raw form, attend to the whole prompt; `future` is half that and half what the query region
    gives."""
    p, raw = prompt_of(C=C, W=5)
    cfg = dataclasses.replace(CFG, past=past)
    columns = past_columns(C, past)
    assert len(columns) == min(past, C) and columns[0] == C - 1 and min(columns) >= 0
    q = torch.stack(
        [
            turned(raw[i][:, :, columns], torch.full((3, len(columns)), p.T + CFG.ahead))
            for i in range(L)
        ]
    )
    want = attention(p, columns, q, causal=False)
    torch.testing.assert_close(p.past(cfg).double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        relevance.future(p, cfg).double(),
        (want + attention(p, list(range(C, p.T)))) / 2,
        rtol=1e-4,
        atol=1e-5,
    )


def test_past_queries_come_from_the_last_span_only(monkeypatch):
    """No query comes from before the last SPAN context tokens: changing those before leaves the
    score of `past` alone."""
    monkeypatch.setattr(relevance, "SPAN", 30)
    p, _ = prompt_of()
    q = [t.clone() for t in p.q]
    for t in q:
        t[:, :, :50] += 1
    assert torch.equal(dataclasses.replace(p, q=q).past(CFG), p.past(CFG))
    q[0][:, :, 79 - 6 * 4] += 1  # 30 // 7 = 4 apart
    assert not torch.equal(dataclasses.replace(p, q=q).past(CFG), p.past(CFG))


def test_uniform_oracle_and_random_are_what_they_say():
    """uniform: 1 for every token; oracle: what the diagnostic pass gave, and refused without one;
    random: in [0, 1), not the same for two layers or heads, the same for every row, counted from
    the prompt's end, whatever the length."""
    p, _ = prompt_of(PAD)
    assert torch.equal(relevance.uniform(p, CFG)[0, :, 0], p.valid.float())
    assert torch.equal(relevance.oracle(p, CFG), p.oracle)
    with pytest.raises(ValueError, match="seen what follows"):
        relevance.oracle(dataclasses.replace(p, oracle=None), CFG)
    a, b = (relevance.random(prompt_of(C=C)[0], CFG) for C in (80, 37))
    assert (
        torch.equal(a[..., -37:], b)
        and torch.equal(a[:, 0], a[:, 1])
        and a.min() >= 0
        and a.max() < 1
    )
    flat = a[:, 0].flatten(0, 1)
    assert len({tuple(r) for r in flat.tolist()}) == L * HKV and abs(flat.mean() - 0.5) < 0.1


# -------------------- what holds for all of them


def drawn_predictor(
    name: str, mask_heads: int = HKV, layers: int = L, seed: int = 5
) -> torch.nn.Module:
    """A predictor in float64 with every parameter and buffer random."""
    torch.manual_seed(seed)
    n_out = mask_heads * (S if name == "predictor" else 1)
    p = (
        QueryPredictor(L, E, HKV, D)
        if name == "predictor_query"
        else HiddenPredictor(layers, E, mask_heads, n_out)
    )
    randomise(p, 0.2)
    p.mean.normal_(2, 1)
    p.std.uniform_(0.5, 2)
    return p.double()


def test_predictor_of_a_target_that_never_changed_stays_sane():
    """A target that was the same for every token that was measured, but for rounding, or always 0,
    makes no loss explode, neither then nor when another text changes it; what never was more than 0
    is predicted as 0, and the others are normalised as before."""
    p, _ = prompt_of()
    p = dataclasses.replace(p, x=[x.float() for x in p.x])
    torch.manual_seed(3)
    predictor = HiddenPredictor(L, E, HKV, HKV)
    target = torch.rand(L, 3, HKV, p.n_context, 1) * 1e-3
    target[0, :, 0] = 0.3
    target[1, :, 1] = 0
    predictor.fit([p, p], [target, target])
    std = predictor.std[:, 0]
    assert std[0, 0] == target[0, 0, 0, 0, 0] and std[1, 1] == 0
    both = torch.cat((target, target), 1)
    spread = both.transpose(1, 2).flatten(2).std(-1)
    torch.testing.assert_close(std[0, 1:], spread[0, 1:])
    for changed in (target, target + 1e-4):
        assert predictor.loss(p, changed, "mse") < 3
    scores = predictor(p, "mse")
    assert (scores[1, :, 1] == 0).all() and scores.isfinite().all()


def score(name: str, p: Prompt, cfg: SelectConfig = CFG) -> torch.Tensor:
    """Scores of a signal by its name in DEPTH_FREE: (L or 1, B, Hkv or 1, C) or (L, B, Hkv, C, S or
    1)."""
    if name in WITHOUT_TRAINING:
        return WITHOUT_TRAINING[name](p, cfg)
    name, _, kind = name.partition("-")
    return drawn_predictor(name)(p, kind or cfg).detach()


@pytest.mark.parametrize(
    "name, observers",
    [*((name, 0) for name in DEPTH_FREE), ("observed", 75), ("predictor_query", 75)],
)
def test_a_padded_row_scores_as_it_does_alone(name, observers):
    """Neither a row's padding nor the batch around it changes what its tokens score, where more
    tokens are observed than the row has, too. A row without context makes no number infinite or
    undefined elsewhere."""
    p, _ = prompt_of(PAD, observers=observers)
    whole = score(name, p)
    for b, first in enumerate(PAD[:2]):
        mine = whole.expand(whole.size(0), 3, *whole.shape[2:])[:, b, :, first:]
        alone = score(name, row_of(p, b))[:, 0]
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DEPTH_FREE)
def test_a_layer_alone_scores_as_among_the_others(name):
    """A routed prefill asks layer by layer: what a layer's tokens score does not depend on which
    layers are asked together."""
    p, _ = prompt_of(PAD)
    whole = score(name, p)
    for i in range(L):
        got = score(name, layer_of(p, i))[:, :2]
        want = whole[min(i, len(whole) - 1) :][:1, :2]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", sorted(set(WITHOUT_TRAINING) - {"random"}))
def test_kv_heads_permute_with_their_scores(name):
    """Permuting KV heads, their query heads with them, permutes a signal's heads and changes
    nothing else."""
    p, _ = prompt_of(PAD)
    turn = [2, 0, 1]
    swapped = dataclasses.replace(
        p,
        q=[q.unflatten(1, (HKV, -1))[:, turn].flatten(1, 2) for q in p.q],
        k=[k[:, turn] for k in p.k],
        z=[z[:, turn] for z in p.z],
        oracle=p.oracle[:, :, turn],
    )
    got = score(name, swapped)
    want = score(name, p)
    torch.testing.assert_close(
        got, want[:, :, turn] if want.size(2) > 1 else want, rtol=1e-5, atol=1e-7
    )


def test_prompts_count_their_own_tokens():
    """valid leaves out padding, and row_budgets applies its function to every row's context, 0 for a row
    without any."""
    p, _ = prompt_of(PAD)
    assert p.valid.sum(1).tolist() == [80, 59, 0] and p.real.sum(1).tolist() == [91, 70, 6]
    assert (
        row_budgets(p, lambda n: n // 7).tolist() == [11, 8, 0]
        and row_budgets(prompt_of()[0], lambda n: n + 1).tolist() == [81] * 3
    )
    asked = []
    row_budgets(p, lambda n: asked.append(n) or n)
    assert 0 not in asked


# ----------------------------------------------------------------------------- trained signals


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("name", ["predictor", "expected_attention"])
@pytest.mark.parametrize("mask_heads", [1, HKV], ids=["one_mask", "mask_per_head"])
def test_hidden_predictor_is_its_two_layers_token_by_token(name, mask_heads):
    """mse: the network's output times std plus mean, not below 0; kl: shares over a row's (token,
    group) pairs of each mask, times one number per layer. Token by token, in the order masks, then
    groups."""
    net = drawn_predictor(name, mask_heads)
    (p, _) = prompt_of(PAD)
    per = S if name == "predictor" else 1
    out = torch.zeros(L, 2, mask_heads, 80, per, dtype=torch.float64)
    for i in range(L):
        for b in range(2):
            for t in range(80):
                y = (
                    gelu(p.x[i][b, t] @ net.up[i] + net.up_bias[i, 0]) @ net.down[i]
                    + net.down_bias[i, 0]
                )
                for m in range(mask_heads):
                    for g in range(per):
                        out[i, b, m, t, g] = y[m * per + g].detach()
    std, mean = (t.view(L, 1, mask_heads, 1, per) for t in (net.std, net.mean))
    torch.testing.assert_close(net(p, "mse")[:, :2], (out * std + mean).clamp_min(0))
    got = net(p, "kl")
    for b, first in enumerate(PAD[:2]):
        e = out[:, b, :, first:].exp()
        torch.testing.assert_close(
            got[:, b, :, first:],
            e / e.sum((-1, -2), keepdim=True) * net.mean.mean((1, 2)).view(L, 1, 1, 1),
        )
        assert not got[:, b, :, :first].any()


@pytest.mark.parametrize("name", ["predictor", "expected_attention"])
def test_hidden_predictor_losses_are_those_of_the_formulas(name):
    """fit: mean and standard deviation of every output's targets, over all tokens of all prompts.
    mse: to the normalised target; kl: of the target's shares from the predicted ones, a mean over
    layers, rows and masks. Gradients reach every parameter, but a kl does not see one number added
    to every score of a mask."""
    net = drawn_predictor(name)
    per = S if name == "predictor" else 1
    prompts = [prompt_of(seed=s)[0] for s in (1, 2)]
    targets = [torch.rand(L, 3, HKV, 80, per, dtype=torch.float64) for _ in range(2)]
    net.fit(prompts, targets)
    every = torch.cat(targets, 1)  # (L, 6, Hkv, 80, per)
    for i in range(L):
        for m in range(HKV):
            for g in range(per):
                flat = every[i, :, m, :, g].flatten()
                average = sum(flat.tolist()) / len(flat)
                spread = math.sqrt(sum((t - average) ** 2 for t in flat.tolist()) / (len(flat) - 1))
                assert (
                    abs(float(net.mean[i, 0, m * per + g]) - average) < 1e-9
                    and abs(float(net.std[i, 0, m * per + g]) - spread) < 1e-9
                )
    p = prompts[0]
    target = targets[0]
    out = net.normalised(p).detach().view(L, 3, 80, HKV, per).transpose(2, 3)
    std, mean = (t.view(L, 1, HKV, 1, per) for t in (net.std, net.mean))
    by_hand = {"mse": ((out - (target - mean) / std) ** 2).mean()}
    terms = []
    for i in range(L):
        for b in range(3):
            for m in range(HKV):
                want = target[i, b, m] / target[i, b, m].sum()
                e = out[i, b, m].exp()
                terms.append((want * (want.log() - (e / e.sum()).log())).sum())
    by_hand["kl"] = sum(terms) / len(terms)
    for kind in ("mse", "kl"):
        net.zero_grad()
        loss = net.loss(p, target, kind)
        torch.testing.assert_close(loss, by_hand[kind])
        loss.backward()
        for n, w in net.named_parameters():
            assert w.grad.abs().max() > 1e-9 or (n, kind, name) == (
                "down_bias",
                "kl",
                "expected_attention",
            ), n
    constant = torch.ones_like(target)
    net.fit(prompts, [constant, constant])
    assert torch.isfinite(net.loss(p, constant, "mse"))


def test_query_predictor_features_are_those_of_the_loops():
    """Eleven of them, by name: logs of observed attention bare and max-pooled over 5 and 15, of past
    queries' attention bare and pooled over 5, of the largest attention of an asking query bare and
    pooled over 5, of the value's norm; the key's norm, the log distance to the context's end in
    units of 64, and whether a token is among the first 4."""
    p, _ = prompt_of((0, 21, 3))
    cfg = dataclasses.replace(CFG, past=10**6)
    got = drawn_predictor("predictor_query").features(p, cfg)
    assert got.shape == (L, HKV, 3, 80, 11)
    seen = attention(p, list(range(80, 91)))
    most = largest(p, list(range(80, 91)))
    columns = past_columns(80, 10**6)
    past = attention(p, columns, p.moved(torch.tensor(columns), cfg.ahead).double(), causal=False)
    for b, first in enumerate(p.pad.tolist()):
        for t in range(first, 80, 3):
            for i in range(L):
                for h in range(HKV):
                    five, fifteen = (slice(max(0, t - r), t + r + 1) for r in (2, 7))
                    mine = seen[i, b, h], past[i, b, h], most[i, b, h]
                    shares = (
                        mine[0][t],
                        mine[0][five].max(),
                        mine[0][fifteen].max(),
                        mine[1][t],
                        mine[1][five].max(),
                        mine[2][t],
                        mine[2][five].max(),
                        p.z[i][b, h, t].norm(),
                    )
                    want = [math.log(max(float(s), relevance.TINY)) for s in shares]
                    want += [
                        float(p.k[i][b, h, t].norm()),
                        math.log((80 - t) / 64 + 1),
                        float(t - first < 4),
                    ]
                    torch.testing.assert_close(
                        got[i, h, b, t].double(),
                        torch.tensor(want, dtype=torch.float64),
                        rtol=1e-4,
                        atol=1e-3,
                    )


def query_scores(
    net: QueryPredictor, p: Prompt, f: torch.Tensor, i: int, b: int, h: int, t: int
) -> torch.Tensor:
    """One token's log-score, from the features f (L, Hkv, B, C, 11)."""
    y = (f[i, h, b, t].double() - net.mean[i, h]) / net.std[i, h]
    s = (
        gelu(y @ net.up[i, h] + net.up_bias[i, h, 0]) @ net.down[i, h, :, 0]
        + y @ net.linear[i, h, :, 0]
    )
    s = s + gelu(p.x[i][b, t] @ net.token_up[i]) @ net.token_down[i, :, h]
    u = (
        gelu(p.x[i][b, p.T - (p.observers or p.T - p.n_context) :].mean(0) @ net.query_up[i])
        @ net.query_down[i, :, h * D : (h + 1) * D]
    )
    return s + p.k[i][b, h, t] @ u / math.sqrt(D)


@pytest.mark.parametrize("observers", [0, 20])
def test_query_predictor_is_its_formula_and_its_loss_a_kl_divergence(observers):
    """alpha is the softmax of the token-by-token log-scores times the observed attention of the
    context; the loss is the KL divergence from the shares of the target, a mean over layers, rows
    and heads; its gradients reach every parameter, at the start every last one of a network."""
    net = drawn_predictor("predictor_query")
    (p, _) = prompt_of(C=37, observers=observers)
    net.fit([p], CFG)
    f = net.features(p, CFG)
    torch.testing.assert_close(net.mean, f.double().mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        net.std, f.double().flatten(2, 3).std(2) + 1e-3, rtol=1e-4, atol=1e-5
    )
    target = torch.rand(L, 3, HKV, 37, dtype=torch.float64)
    terms = []
    alpha = net(p, CFG).detach().double()
    observed = attention(p, list(range(48 - (observers or 11), 48)))
    for i in range(L):
        for b in range(3):
            for h in range(HKV):
                s = torch.stack([query_scores(net, p, f, i, b, h, t) for t in range(37)]).detach()
                torch.testing.assert_close(
                    alpha[i, b, h], s.softmax(0) * observed[i, b, h].sum(), rtol=1e-4, atol=1e-7
                )
                want = target[i, b, h] / target[i, b, h].sum()
                terms.append((want * (want.log() - s.log_softmax(0))).sum())
    loss = net.loss(p, target, CFG)
    torch.testing.assert_close(loss, sum(terms) / len(terms))
    loss.backward()
    assert all(w.grad.abs().max() > 1e-9 for w in net.parameters())
    fresh = QueryPredictor(L, E, HKV, D).double()
    fresh.fit([p], CFG)
    fresh.loss(p, target, CFG).backward()
    assert all(
        getattr(fresh, n).grad.abs().max() > 1e-9
        for n in ("down", "linear", "token_down", "query_down")
    )


def test_a_fresh_query_predictor_ranks_by_observed_attention():
    """Before training only the feature of observed attention, pooled over 5, counts: the order of
    tokens is that of `observed`."""
    p, _ = prompt_of(PAD)
    fresh = QueryPredictor(L, E, HKV, D).double()
    fresh.fit([prompt_of(seed=3)[0]], CFG)
    alpha = fresh(p, CFG)
    seen = relevance.observed(p, CFG)
    for b, first in enumerate(PAD[:2]):
        a = alpha[:, b, :, first:]
        s = seen[:, b, :, first:]
        steps = a.detach().gather(-1, s.argsort(-1)).diff(dim=-1)
        assert (steps >= -1e-6).all()


def test_query_predictor_permutes_with_its_heads():
    """KV heads of the inputs and of every parameter and buffer permuted together: alpha's heads are
    permuted, nothing else changes."""
    net = drawn_predictor("predictor_query")
    (p, _) = prompt_of(PAD)
    turn = [2, 0, 1]
    swapped = dataclasses.replace(
        p,
        q=[q.unflatten(1, (HKV, -1))[:, turn].flatten(1, 2) for q in p.q],
        k=[k[:, turn] for k in p.k],
        z=[z[:, turn] for z in p.z],
    )
    other = drawn_predictor("predictor_query")
    with torch.no_grad():
        for name in ("up", "up_bias", "down", "linear", "mean", "std"):
            getattr(other, name).copy_(getattr(net, name)[:, turn])
        other.token_down.copy_(net.token_down[..., turn])
        other.query_down.copy_(net.query_down.unflatten(-1, (HKV, D))[..., turn, :].flatten(-2))
    torch.testing.assert_close(
        other(swapped, CFG)[:, :2], net(p, CFG)[:, :2, turn], rtol=1e-5, atol=1e-8
    )


def test_only_the_query_predictor_sees_the_query_region():
    """With another query region, hidden states, queries and keys, the paper's predictor says the
    same number for number, in both of its forms; predictor_query does not. And the paper's reads
    hidden states alone."""
    p, _ = prompt_of(PAD)
    x, q, k = ([t.clone() for t in ts] for ts in (p.x, p.q, p.k))
    for i in range(L):
        x[i][:, 80:] += 1
        q[i][:, :, 80:] *= -1
        k[i][:, :, 80:] += 1
    other = dataclasses.replace(p, x=x, q=q, k=k)
    blind = dataclasses.replace(
        other, q=[t * 2 for t in q], k=[t * 3 for t in k], z=[t * 5 for t in p.z]
    )
    for name in TRAINED[:4]:
        assert torch.equal(score(name, other)[:, :2], score(name, p)[:, :2]) and torch.equal(
            score(name, blind)[:, :2], score(name, p)[:, :2]
        )
    assert not torch.allclose(
        score("predictor_query", other)[:, :2], score("predictor_query", p)[:, :2], atol=1e-4
    )


@pytest.mark.parametrize("change", ["x", "q", "k"])
def test_query_predictor_uses_every_part_of_the_region(change):
    """Hidden states, queries and keys of the query region each move alpha on their own."""
    p, _ = prompt_of()
    part = [t.clone() for t in getattr(p, change)]
    for t in part:
        t.narrow(1 if change == "x" else 2, 80, 11).add_(1)
    assert not torch.allclose(
        score("predictor_query", dataclasses.replace(p, **{change: part})),
        score("predictor_query", p),
        atol=1e-5,
    )


def test_rope_of_the_tests_is_the_models():
    """The float64 rotation of these tests and model.apply_rope turn the same way."""
    x = torch.randn(1, 1, 9, D, dtype=torch.float64)
    at = torch.arange(9) * 7
    cos, sin = rope_table(TINY)
    torch.testing.assert_close(
        turned(x, at[None]), apply_rope(x, cos[at], sin[at]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("impl", ["torch", KERNEL])
@pytest.mark.parametrize("C, D, S", [(1, 8, 2), (70, 32, 8), (65, 16, 16)])
def test_norms_of_groups_are_those_of_loops(C, D, S, impl):
    """Of values that lie token by token, against sums in float64."""
    z = torch.randn(2, 3, C, 2, D, generator=torch.Generator().manual_seed(0)).transpose(2, 3)
    z = z.to(DEVICE)
    p = dataclasses.replace(prompt_of()[0], z=list(z), n_groups=S, impl=impl)
    assert p.norms.dtype == torch.float32 and p.norms.shape == (2, 3, 2, C, S)
    for g in range(S):
        group = z[..., g * (D // S) : (g + 1) * (D // S)].double()
        want = sum(group[..., i] ** 2 for i in range(D // S)).sqrt()
        assert (p.norms[..., g] - want).abs().max() < 1e-6


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 3, 2)])
def test_tensors_beside_one_another_are_a_stack(order):
    """Whatever their order in memory, which the stack keeps."""
    ts = [torch.randn(3, 4, 5, 6).permute(order) for _ in range(3)]
    got = beside(ts)
    assert torch.equal(got, torch.stack(ts))
    assert got.stride()[1:] == ts[0].stride()
