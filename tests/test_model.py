"""The trunk against hand-written float64 oracles: norm, rotation, attention, cache, decoding,
sampling."""

import cmath
import dataclasses
import itertools
import math

import pytest
import torch
from helpers import read_in_pieces
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from config import ModelConfig
from generate import generate, sampling_probs
from model import RMSNorm, Transformer, apply_rope, attend, rope_table
from storage.cache import NewTokens
from storage.dense import DenseCache
from training.loss import lm_loss

VOCAB = 23
CONTEXT = 31
GQA = pytest.mark.parametrize("n_kv_head", [4, 2, 1], ids=["groups1", "groups2", "groups4"])


def build(
    seed: int = 0, std: float = 0.35, dtype: torch.dtype = torch.float64, **shape
) -> Transformer:
    """A tiny model whose every parameter is random and large: norms, biases and all, so that none
    can hide an error."""
    base = ModelConfig(
        vocab_size=VOCAB,
        block_size=CONTEXT,
        n_layer=3,
        n_embd=20,
        n_head=4,
        n_kv_head=2,
        head_dim=6,
        n_inner=17,
        rope_theta=100.0,
        qkv_bias=True,
        tie_embeddings=False,
    )
    model = Transformer(dataclasses.replace(base, **shape)).to(dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(std * torch.randn(p.shape, generator=g, dtype=torch.float64) + ("norm" in name))
    return model.eval()


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def one_line(error: pytest.ExceptionInfo) -> bool:
    return len(str(error.value).splitlines()) == 1


# ---- norm and rotation


def test_rmsnorm_equals_hand_written_float64():
    """Every number of RMSNorm is weight * x / sqrt(mean(x^2) + eps), summed by hand."""
    norm = RMSNorm(13, 1e-2).double()
    x = 0.3 * normal(2, 5, 13)
    norm.weight.data = normal(13, seed=3)
    got = norm(x)
    for b, t in itertools.product(range(2), range(5)):
        row = x[b, t].tolist()
        rms = math.sqrt(math.fsum(v * v for v in row) / 13 + 1e-2)
        assert got[b, t].tolist() == pytest.approx(
            [w * v / rms for w, v in zip(norm.weight.tolist(), row, strict=True)], rel=1e-13
        )


def test_rmsnorm_bfloat16_statistics_stay_exact():
    """In bfloat16 the mean of squares is taken in at least float32: the error is that of rounding
    the result, not of the sum."""
    x = (3 * normal(3, 1001)).bfloat16()
    norm = RMSNorm(1001, 1e-5).bfloat16()
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    got = norm(x)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 2.0**-8 * want.abs()).all()


def test_rope_equals_complex_rotation():
    """apply_rope multiplies the complex numbers x_i + j x_(i + D/2) by exp(j * position *
    theta^(-2i/D))."""
    T = 7
    D = 10
    theta = 50.0
    x = normal(2, 3, T, D)
    angle = torch.tensor(
        [[t * theta ** (-2 * i / D) for i in range(D // 2)] for t in range(T)], dtype=torch.float64
    )
    got = apply_rope(x, angle.cos(), angle.sin())
    for b, h, t, i in itertools.product(range(2), range(3), range(T), range(D // 2)):
        z = complex(x[b, h, t, i], x[b, h, t, i + D // 2]) * cmath.exp(
            1j * t * theta ** (-2 * i / D)
        )
        assert abs(complex(got[b, h, t, i], got[b, h, t, i + D // 2]) - z) < 1e-13


def test_rope_table_far_positions_are_float32_exact():
    """Angles are computed in float64: even at position 99,999 cos and sin are right to half a
    float32 ulp."""
    n = 100_000
    dim = 6
    theta = 1e6
    cos, sin = rope_table(
        dataclasses.replace(build().cfg, block_size=n, head_dim=dim, rope_theta=theta)
    )
    assert cos.shape == sin.shape == (n, dim // 2) and cos.dtype == sin.dtype == torch.float32
    for t, i in itertools.product([0, 1, 4097, 77_777, 99_999], range(dim // 2)):
        angle = t * theta ** (-2 * i / dim)
        assert cos[t, i].item() == pytest.approx(math.cos(angle), abs=2.0**-24)
        assert sin[t, i].item() == pytest.approx(math.sin(angle), abs=2.0**-24)


def test_rope_scores_depend_on_distance_only():
    """<rope(q, m), rope(k, n)> is the same for all m, n of one distance, and differs between
    distances."""
    T = 11
    D = 8
    cos, sin = (
        t.double()
        for t in rope_table(
            dataclasses.replace(build().cfg, block_size=T, head_dim=D, rope_theta=30.0)
        )
    )
    q, k = (
        apply_rope(normal(1, 1, 1, D, seed=s).expand(1, 1, T, D), cos, sin)[0, 0] for s in (4, 5)
    )
    score = q @ k.T
    for distance in range(-T + 1, T):
        diagonal = score.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), 1e-6)
    assert score[0].std() > 0.1


# ---- attention


def attention_by_hand(q, k, v, pad):
    """Softmax attention in Python floats: query i of T at position L - T + i reads keys pad <= j <=
    its position; else None."""
    B, H, T, D = q.shape
    Hkv, L = k.shape[1:3]
    out = {}
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        qi = q[b, h, i].tolist()
        keys = k[b, h * Hkv // H].tolist()
        values = v[b, h * Hkv // H].tolist()
        seen = range(pad[b], L - T + i + 1)
        if not seen:
            continue
        s = [sum(x * y for x, y in zip(qi, keys[j], strict=True)) / math.sqrt(D) for j in seen]
        e = [math.exp(x - max(s)) for x in s]
        out[b, h, i] = [
            sum(w * values[j][d] for w, j in zip(e, seen, strict=True)) / sum(e) for d in range(D)
        ]
    return out


@GQA
@pytest.mark.parametrize(
    "T, L", [(7, 7), (1, 9), (3, 11), (1, 1)], ids=["whole", "one", "chunk", "single"]
)
@pytest.mark.parametrize("pad", [None, (0, 2, 5)], ids=["unpadded", "padded"])
def test_attention_equals_python_loop(n_kv_head, T, L, pad):
    """attend is softmax attention over exactly the keys that are neither later nor padding, for
    every head's own KV head; a padding query, which has none, reads itself."""
    q = 2 * normal(3, 4, T, 6)
    k = normal(3, n_kv_head, L, 6, seed=3)
    v = normal(3, n_kv_head, L, 6, seed=4)
    got = attend(q, k, v, None if pad is None else torch.tensor(pad))
    want = attention_by_hand(q, k, v, pad or (0, 0, 0))
    assert got.shape == q.shape and len(want) >= 4
    for b, h, i in itertools.product(range(3), range(4), range(T)):
        own = v[b, h * n_kv_head // 4, L - T + i].tolist()
        assert got[b, h, i].tolist() == pytest.approx(
            want.get((b, h, i), own), rel=1e-11, abs=1e-12
        )


@pytest.mark.parametrize("pad", [None, (3, 0)], ids=["unpadded", "padded"])
def test_forward_is_causal(pad):
    """Another token at t leaves every logit before t bit for bit as it was, and changes those at
    t."""
    model = build()
    x = ids(2, 9)
    pad = None if pad is None else torch.tensor(pad)
    base = model(x, pad=pad)
    for t in range(4, 9):
        y = x.clone()
        y[:, t] = (y[:, t] + 1) % VOCAB
        out = model(y, pad=pad)
        assert torch.equal(out[:, :t], base[:, :t])
        assert ((out[:, t] - base[:, t]).abs().amax(-1) > 1e-3).all()


def test_forward_gradient_reaches_no_later_and_no_padding_embedding():
    """d logits[t] / d embedding[s] is exactly 0 for s > t and for padding, and not 0 for every
    other s."""
    model = build()
    x = ids(2, 7)
    pad = torch.tensor([0, 3])
    leaves = []
    model.embed_tokens.register_forward_hook(
        lambda m, a, y: leaves.append(y.detach().requires_grad_()) or leaves[-1]
    )
    for t in range(3, 7):
        model(x, pad=pad)[:, t].square().sum().backward()
        size = leaves[-1].grad.abs().amax(-1)  # (B, T)
        for b, s in itertools.product(range(2), range(7)):
            assert (size[b, s] > 0) == (pad[b] <= s <= t), (b, s, t)


@GQA
def test_forward_left_padding_is_ignored(n_kv_head):
    """A left-padded row equals the row alone, whatever ids fill the padding."""
    model = build(n_kv_head=n_kv_head)
    T = 11
    pad = torch.tensor([0, 4, 10])
    x = ids(3, T)
    out = model(x, pad=pad)
    other = x.clone()
    for b, p in enumerate(pad.tolist()):
        assert_close(out[b, p:], model(x[b : b + 1, p:])[0])
        other[b, :p] = (other[b, :p] + 7) % VOCAB
    again = model(other, pad=pad)
    for b, p in enumerate(pad.tolist()):
        assert torch.equal(again[b, p:], out[b, p:])


def test_forward_rows_do_not_influence_each_other():
    """A row's logits are those it has alone, in any order of the batch."""
    model = build()
    x = ids(5, 9)
    out = model(x)
    for b in range(5):
        assert_close(model(x[b : b + 1])[0], out[b])
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_close(model(x[order]), out[order])


# ---- cache


@GQA
@pytest.mark.parametrize(
    "chunks",
    [(13,), (1,) * 13, (5, 1, 3, 4), (1, 12), (2, 11)],
    ids=lambda c: "-".join(map(str, c[:4])),
)
@pytest.mark.parametrize("pad", [None, (0, 3, 8)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_cached_decoding_equals_uncached(n_kv_head, chunks, pad, decode):
    """Logits through the cache equal one forward over everything, however the tokens are cut and
    whichever verb reads single ones, for padded rows too."""
    model = build(n_kv_head=n_kv_head)
    x = ids(3, 13)
    pad = None if pad is None else torch.tensor(pad)
    want = model(x, pad=pad)
    cache = model.new_cache(3, 13)
    got = read_in_pieces(model, x, cache, chunks, pad, decode)
    assert cache.length == 13
    assert cache.lengths.tolist() == [13 - p for p in ([0, 0, 0] if pad is None else pad.tolist())]
    for b in range(3):
        start = 0 if pad is None else int(pad[b])
        assert_close(got[b, start:], want[b, start:])


def test_forward_last_only_is_the_last_column():
    """last_only computes the newest token's logits and nothing else."""
    model = build()
    x = ids(3, 5)
    out = model(x, last_only=True)
    assert out.shape == (3, 1, VOCAB)
    assert_close(out, model(x)[:, -1:])


def test_prefill_last_only_is_the_last_column():
    """prefill gives the last column's logits, or all columns' where they are asked for."""
    model = build()
    x = ids(3, 5)
    last = model.prefill(x, model.new_cache(3, 5))
    whole = model.prefill(x, model.new_cache(3, 5), last_only=False)
    assert last.shape == (3, 1, VOCAB)
    assert whole.shape == (3, 5, VOCAB)
    assert_close(last, whole[:, -1:])


def test_dense_cache_overflow_is_refused_and_changes_nothing():
    """A full buffer raises a one-line ValueError; length and contents stay."""
    cache = DenseCache(2, 5, 3, 4, torch.empty(0, dtype=torch.float64))
    k = normal(2, 3, 4, 4)
    v = normal(2, 3, 4, 4, seed=3)
    cache.append(NewTokens(k, v, None))
    with pytest.raises(ValueError, match=r"5 tokens cannot take 6.*max_len") as e:
        cache.append(NewTokens(k[:, :, :2], v[:, :, :2], None))
    assert one_line(e)
    assert cache.lengths.tolist() == [4, 4]
    cache.append(NewTokens(k[:, :, :1], v[:, :, :1], None))
    window = cache.view().window
    assert window.count.tolist() == [5, 5]
    assert torch.equal(window.k, torch.cat((k, k[:, :, :1]), 2))
    assert torch.equal(window.v, torch.cat((v, v[:, :, :1]), 2))


@pytest.mark.parametrize(
    "dtype, size",
    [(None, 8), (torch.float32, 4), (torch.bfloat16, 2)],
    ids=["model", "float32", "bfloat16"],
)
def test_cache_nbytes_equals_the_storage_held(dtype, size):
    """nbytes is the bytes of the distinct storages the cache holds: in every layer (K, V) x B x Hkv
    x max_len x D x element size, and the lengths, 8 bytes a sequence."""
    cache = build().new_cache(3, 7, dtype=dtype)
    storages = {
        s.data_ptr(): s.nbytes()
        for layer in cache.layers
        for t in vars(layer).values()
        if isinstance(t, torch.Tensor)
        for s in [t.untyped_storage()]
    }
    assert cache.nbytes() == sum(storages.values()) == 3 * (2 * 3 * 2 * 7 * 6 * size + 3 * 8)


def test_forward_past_the_context_is_refused():
    """block_size tokens fit, one more is a one-line ValueError, with and without a cache; the cache
    is left as it was."""
    model = build(n_layer=1)
    assert model(ids(1, CONTEXT)).shape == (1, CONTEXT, VOCAB)
    with pytest.raises(ValueError, match=f"context is {CONTEXT}") as e:
        model(ids(1, CONTEXT + 1))
    assert one_line(e)
    cache = model.new_cache(1, CONTEXT + 9)
    model.prefill(ids(1, CONTEXT - 1), cache)
    with pytest.raises(ValueError, match=f"context is {CONTEXT}"):
        model.prefill(ids(1, 2), cache)
    assert cache.length == int(cache.layers[0].lengths) == CONTEXT - 1
    model.decode(ids(1, 1), cache)
    with pytest.raises(ValueError, match=f"context is {CONTEXT}") as e:
        model.decode(ids(1, 1), cache)
    assert one_line(e)
    assert cache.length == int(cache.layers[0].lengths) == CONTEXT


# ---- parameters and loss


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_head_shares_storage_only_when_tied(tied):
    """A tied head is the embedding itself, counted once; an untied one has its own numbers."""
    model = build(tie_embeddings=tied)
    assert (model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()) == tied
    linear = 20 * 24 + 2 * 20 * 12 + 24 * 20 + 3 * 20 * 17  # q, k and v, o, MLP
    want = 3 * (linear + 24 + 12 + 12 + 2 * 20) + 20 + VOCAB * 20 * (1 if tied else 2)
    assert sum(p.numel() for p in model.parameters()) == want
    x = ids(1, 5)
    before = None
    for _ in range(2):  # a change of the head alone reaches the embedding exactly when it is tied
        before = model.embed_tokens(x).clone() if before is None else before
        embedded = model.embed_tokens(x)
        model.lm_head.weight.data.add_(1.0)
    assert torch.equal(before, embedded) != tied


def test_init_has_the_stated_scale():
    """At the start: weights N(0, 0.02), residual outputs 0.02 / sqrt(2 layers), norms 1, biases 0,
    and a loss of ln(vocab)."""
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=301,
            block_size=31,
            n_layer=3,
            n_embd=96,
            n_head=4,
            n_kv_head=2,
            head_dim=24,
            n_inner=131,
            qkv_bias=True,
            tie_embeddings=False,
        )
    )
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            want = 0.02 / math.sqrt(6) if "o_proj" in name or "down_proj" in name else 0.02
            assert (
                p.std().item() == pytest.approx(want, rel=0.05)
                and abs(p.mean().item()) < 0.1 * want
            ), name
    x = ids(3, 17)
    assert lm_loss(model(x[:, :-1]), x[:, 1:]).item() == pytest.approx(math.log(301), abs=0.05)


def test_lm_loss_equals_mean_negative_log_probability():
    """lm_loss is the mean over the targets that are not -100 of -log softmax, in nats."""
    logits = 3 * normal(2, 5, 7)
    targets = torch.tensor([[3, -100, 0, 6, 1], [-100, -100, 2, 5, 5]])
    nll = []
    for b, t in itertools.product(range(2), range(5)):
        if targets[b, t] >= 0:
            row = logits[b, t].tolist()
            nll.append(math.log(sum(map(math.exp, row))) - row[targets[b, t]])
    assert lm_loss(logits, targets).item() == pytest.approx(sum(nll) / 7, rel=1e-13)


# ---- generate

PROMPTS = [ids(n, seed=n).tolist() for n in (7, 1, 4)]


def greedy_alone(model, prompt: list[int], n: int) -> list[int]:
    """Argmax decoding of one row, no cache, no padding."""
    row = list(prompt)
    for _ in range(n):
        row.append(model(torch.tensor([row]))[0, -1].argmax().item())
    return row[len(prompt) :]


@GQA
def test_generate_greedy_equals_argmax_loop_without_cache(n_kv_head):
    """Temperature 0 over a ragged batch gives each row the tokens of an uncached, unpadded argmax
    loop; the caches end full."""
    model = build(n_kv_head=n_kv_head)
    rows, cache = generate(model, PROMPTS, 11)
    assert rows == [greedy_alone(model, p, 11) for p in PROMPTS]
    # not a constant model
    assert len({tuple(r) for r in rows}) == 3 and len({t for r in rows for t in r}) > 4
    assert cache.length == 7 + 11 - 1  # the last token was never fed back
    assert cache.nbytes() == 3 * (2 * 3 * n_kv_head * 17 * 6 * 8 + 3 * 8)


@pytest.mark.parametrize("temperature", [0.0, 1.3], ids=["greedy", "sampled"])
def test_generate_row_is_independent_of_its_neighbours(temperature):
    """A row's tokens are the same alone, beside short rows, and beside a longer row that pads
    it."""
    model = build()
    draw = lambda *rows: generate(
        model, list(rows), 9, temperature=temperature, top_p=0.97, seed=5
    )[0]
    a, b, c = PROMPTS
    want = draw(b)[0]
    assert draw(b, c)[0] == draw(b, a)[0] == draw(b, a + c, c)[0] == draw(b, b)[0] == want
    if temperature:
        assert draw(b, b)[1] != want  # each row has a stream of its own


def test_generate_sampling_is_reproducible():
    """One seed gives one text, whatever torch's global generator does and without touching it;
    another seed gives another."""
    model = build(std=0.2)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = generate(model, PROMPTS, 9, temperature=1.0, seed=3)[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert generate(model, PROMPTS, 9, temperature=1.0, seed=3)[0] == first
    assert generate(model, PROMPTS, 9, temperature=1.0, seed=4)[0] != first


@pytest.mark.parametrize(
    "settings_",
    [{"temperature": 0.9}, {"temperature": 1.4, "top_k": 7}, {"temperature": 1.1, "top_p": 0.8}],
    ids=["plain", "top_k", "top_p"],
)
def test_generate_frequencies_match_the_probabilities(settings_):
    """Over 3000 rows the drawn ids follow sampling_probs (chi-square under its 1 - 1e-5 quantile)
    and never leave its support."""
    model = build(std=0.22, n_layer=1)
    n = 3000
    p = sampling_probs(model(torch.tensor([PROMPTS[0]]))[:, -1], **settings_)[0]
    rows, _ = generate(model, [PROMPTS[0]] * n, 1, seed=11, **settings_)
    count = torch.bincount(torch.tensor(rows).flatten(), minlength=VOCAB).double()
    support = p > 0
    assert support.sum() > 5 and (count[~support] == 0).all()
    chi2 = ((count - n * p)[support].square() / (n * p[support])).sum().item()
    dof = int(support.sum()) - 1
    # Laurent-Massart: P(chi2 > dof + 2 sqrt(dof x) + 2x) < exp(-x)
    assert chi2 < dof + 4.3 * math.sqrt(2 * dof) + 12
    uniform = n / int(support.sum())
    # the test can tell p from uniform
    assert ((count - uniform)[support].square() / uniform).sum().item() > 10 * dof


def test_generate_stop_token_cuts_the_row():
    """A row ends before its first stop token, the others go on; generation ends once all rows have
    stopped."""
    model = build()
    free, _ = generate(model, PROMPTS, 11)
    stop = free[0][4]
    cut = [r[: r.index(stop)] if stop in r else r for r in free]
    rows, _ = generate(model, PROMPTS, 11, stop=stop)
    assert rows == cut and 0 < len(rows[0]) <= 4 and len(rows[0]) < max(map(len, rows))
    alone, cache = generate(model, PROMPTS[:1], 11, stop=stop)
    assert alone == [cut[0]] and cache.length == 7 + len(cut[0])
    assert generate(model, PROMPTS[:1], 11, stop=free[0][0])[0] == [[]]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_generate_leaves_the_model_as_it_was(training):
    """Mode, parameters and gradients are untouched."""
    model = build().train(training)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    generate(model, PROMPTS, 3)
    assert all(m.training == training for m in model.modules())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "prompts, n, kw, match",
    [
        ([], 1, {}, "empty prompt"),
        ([[]], 1, {}, "empty prompt"),
        ([[3], []], 1, {}, "empty prompt"),
        ([[3]], 0, {}, "max_new_tokens=0"),
        ([[3]], -2, {}, "max_new_tokens=-2"),
        ([[3]], 1, {"temperature": -0.1}, "temperature=-0.1"),
        ([[3]], 1, {"temperature": math.nan}, "temperature=nan"),
        ([[3]], 1, {"top_k": -1}, "top_k=-1"),
        ([[3]], 1, {"top_p": 0.0}, "top_p=0.0"),
        ([[3]], 1, {"top_p": 1.01}, "top_p=1.01"),
        ([[3]], 1, {"top_p": math.nan}, "top_p=nan"),
        ([[3], [2] * 28], 4, {}, "context is 31"),
    ],
    ids=str,
)
def test_generate_bad_settings_are_one_line_errors(prompts, n, kw, match):
    """Every wrong setting is a ValueError of one line that names it."""
    with pytest.raises(ValueError, match=match) as e:
        generate(build(n_layer=1), prompts, n, **kw)
    assert one_line(e)


def test_generate_fills_the_context_exactly():
    """Prompt and new tokens may together take the whole context."""
    assert len(generate(build(n_layer=1), [[2] * 28, [5]], 3)[0][0]) == 3


# ---- sampling_probs


def probs_by_hand(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Softmax, then the top_k likeliest (equal: lower id first), then the shortest run of them
    whose share reaches top_p."""
    m = max(logits)
    p = [math.exp((x - m) / temperature) for x in logits]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or None]
    total = math.fsum(p[i] for i in order)
    run = 0.0
    kept = []
    for i in order:
        if top_p < 1:
            # at the boundary itself rounding decides: tested apart, with exact numbers
            assume(abs(run / total - top_p) > 1e-9)
            if run / total >= top_p:
                break
        kept.append(i)
        run += p[i]
    return [p[i] / run if i in kept else 0.0 for i in range(len(p))]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    logits=st.lists(
        st.sampled_from([-math.inf, -800.0, -3.0, -1.0, 0.0, 0.5, 2.0, 40.0]),
        min_size=1,
        max_size=9,
    ),
    temperature=st.sampled_from([1e-30, 0.01, 0.7, 1.0, 3.0, 1e6]),
    top_k=st.integers(0, 11),
    top_p=st.sampled_from([1e-9, 0.2503, 0.5003, 0.9071, 0.999, 1.0]),
)
def test_sampling_probs_equals_brute_force(logits, temperature, top_k, top_p):
    """Temperature, top-k and top-p in this order, ties to the lower id, for ties, infinities and
    extreme temperatures."""
    assume(max(logits) > -math.inf)
    want = probs_by_hand(logits, temperature, top_k, top_p)
    got = sampling_probs(
        torch.tensor([logits, logits[::-1]], dtype=torch.float64), temperature, top_k, top_p
    )
    assert got[0].tolist() == pytest.approx(want, rel=1e-12, abs=1e-300)
    assert [x > 0 for x in got[0].tolist()] == [x > 0 for x in want]


@pytest.mark.parametrize(
    "top_k, top_p, kept",
    [
        (0, 0.5, 4),
        (0, 0.5 + 2.0**-20, 5),
        (3, 1.0, 3),
        (4, 0.5, 2),
        (0, 1e-30, 1),
        (8, 1.0, 8),
        (99, 1.0, 8),
    ],
)
def test_sampling_probs_ties_and_exact_boundary(top_k, top_p, kept):
    """Of eight equal logits the first ids are kept, and the set whose mass is exactly top_p is not
    enlarged."""
    got = sampling_probs(torch.full((1, 8), 3.0), 0.5, top_k, top_p)[0]
    assert got.tolist() == pytest.approx([1 / kept] * kept + [0.0] * (8 - kept))


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_probs_extreme_temperatures_stay_finite(temperature, dtype):
    """No temperature makes a NaN: towards 0 all mass goes to the largest logit, towards infinity it
    is spread evenly."""
    got = sampling_probs(torch.tensor([[-5.0, 60.0, 7.0, -1e4, -3e38]], dtype=dtype), temperature)[
        0
    ]
    assert (
        got.dtype == torch.float32 and got.isfinite().all() and got.sum().item() == pytest.approx(1)
    )
    if temperature <= 1.0:
        assert got[1] == 1
    else:
        assert got[:4].tolist() == pytest.approx([got[0].item()] * 4)


def test_sampling_probs_top_p_one_drops_nothing():
    """top_p = 1 is no cut: ids of a probability far below one float32 ulp keep it."""
    logits = torch.tensor([[0.0, -30.0, -60.0]])
    assert torch.equal(sampling_probs(logits, 1.0, 0, 1.0) > 0, torch.ones(1, 3, dtype=torch.bool))
