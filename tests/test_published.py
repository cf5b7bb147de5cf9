"""The rivals as they were published (baselines/): what each scores, picks, stores and reads, against
loops over tokens, heads and queries; and eval.py's rows of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, error_line, randomise, read_in_pieces, tiny_model, tokens
from scored_prompts import CFG, CLOSE, HKV, PAD, D, H, L, attention, on_real, prompt_of, widest

import eval as evaluation
import selector
from baselines import kivi, quest
from baselines import tokens as room
from config import PUBLISHED, KVConfig, Published, SelectConfig
from loaders.runs import load_run
from measure_config import EvalConfig
from model import DensePath, rope_table
from report.plan import Asked, as_published, ways_to_choose
from report.rivals import Rival, in_place, rivals_of
from report.rows import method_of
from report.tables import result_table
from runs import pretrain
from selection.relevance import Prompt
from storage.cache import KVCache

# -------------------- signals that drop whole tokens


@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_snapkv_is_pooled_attention_of_the_window_that_stays(pad):
    """Before the prompt's last 32 tokens a score is the mean attention of those that are no padding,
    a maximum over 7 tokens, those in the window not among them; the window's own tokens score more
    than any other, the newer the more."""
    pad = tuple(n // 2 for n in pad[:2])
    for p in (prompt_of(pad, C=42)[0], prompt_of(pad, C=19, W=3)[0], prompt_of(pad, C=20, W=34)[0]):
        got = on_real(room.snapkv(p, CFG), p)
        first = max(0, p.T - 32)
        seen = attention(p, list(range(first, p.T)))
        seen[..., first:] = 0
        want = widest(seen, p, 7)
        edge = min(first, p.n_context)
        torch.testing.assert_close(got[..., :edge], want[..., :edge], **CLOSE)
        for b, n_pad in enumerate(pad):
            new = got[:, b, :, max(edge, n_pad) :]
            assert (new.diff() > 0).all() and (new > 1).all()
            assert edge in (0, p.n_context) or new.min() > got[:, b, :, :edge].max()


@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_h2o_is_accumulated_attention_with_the_newest_half_first(pad):
    """Below the newest floor(n token_keep / 2) tokens of a row the scores are the sums of attention
    of every query of the prompt; those tokens score more than any other, the newer the more."""
    p, _ = prompt_of(pad, C=46)
    got = room.h2o(p, CFG).double()
    want = attention(p, list(range(p.T)), total=True)
    for b, first in enumerate(pad[:2]):
        n = p.n_context - first
        new = p.n_context - int(n * 0.3 / 2)
        torch.testing.assert_close(got[:, b, :, :new], want[:, b, :, :new], rtol=1e-4, atol=1e-5)
        assert (got[:, b, :, new:].amin(-1) > got[:, b, :, :new].amax(-1)).all()
        assert (got[:, b, :, new + 1 :] > got[:, b, :, new:-1]).all()
    assert not got[:, 2].any() or pad == (0, 0, 0)


def test_h2o_adds_up_over_long_prompts():
    """Past 512 queries, which come in several parts, the sums are those of one causal softmax over
    everything."""
    g = torch.Generator().manual_seed(0)
    C = 601
    W = 5
    q, k = (torch.randn(1, h, C + W, 4, generator=g, dtype=torch.float64) for h in (2, 1))
    p = Prompt([q[0, :1]], [q], [k], [k[:, :, :C]], C, None, rope_table(TINY))
    logits = (q @ k.mT / 2).masked_fill(
        torch.ones(C + W, C + W, dtype=torch.bool).triu(1), -math.inf
    )
    want = logits.softmax(-1).mean(1).sum(1)[0, :C]
    got = room.h2o(p, dataclasses.replace(CFG, token_keep=1e-3))[0, 0, 0].double()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_streaming_prefers_the_newest_token():
    """Within a row scores rise by one from token to token; padding scores 0."""
    p, _ = prompt_of(PAD)
    got = room.streaming(p, CFG).expand(1, 3, 1, -1)[0, :, 0]
    for b, first in enumerate(PAD):
        first = min(first, p.n_context)
        assert (
            not got[b, :first].any()
            and (got[b, first:].diff() == 1).all()
            and (got[b, first:] > 0).all()
        )


@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_quest_scores_pages_by_their_bounds(pad):
    """Pages of 16 from a row's first token, the last one shorter: the largest q . k that keys
    between a page's least and largest coordinates allow, as shares over pages, a mean over the
    region's queries and heads; a page's tokens score alike."""
    p, _ = prompt_of(pad)
    # zeros, which padding holds, are no key's coordinate then
    far = torch.tensor([6.0, -6]).repeat(D // 2)
    p = dataclasses.replace(p, k=[k * 0.3 + far for k in p.k], q=[q * 0.3 for q in p.q])
    n = H // HKV
    got = room.quest(p, CFG).double()
    for b, first in enumerate(pad):
        pages = [range(a, min(a + 16, p.n_context)) for a in range(first, p.n_context, 16)]
        for i in range(L) if pages else ():
            for kv in range(HKV):
                share = torch.zeros(len(pages), dtype=torch.float64)
                for h in range(kv * n, kv * n + n):
                    for r in range(p.n_context, p.T):
                        q = p.q[i][b, h, r]
                        # (C, D): a coordinate's largest in a page is its bound
                        products = p.k[i][b, kv, : p.n_context] * q / math.sqrt(D)
                        bound = torch.stack([products[list(page)].amax(0).sum() for page in pages])
                        for page, limit in zip(pages, bound.tolist(), strict=True):
                            assert products[list(page)].sum(-1).max() <= limit + 1e-9
                        share += bound.softmax(0) / n / (p.T - p.n_context)
                for page, s in zip(pages, share.tolist(), strict=True):
                    torch.testing.assert_close(
                        got[i, b, kv, list(page)],
                        torch.full((len(page),), s, dtype=torch.float64),
                        rtol=1e-4,
                        atol=1e-6,
                    )
                    assert len(set(got[i, b, kv, list(page)].tolist())) == 1
        assert not got[:, b, :, : min(first, p.n_context)].any()


@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_tova_is_the_last_query_s_attention_over_all_heads(pad):
    """One score for all heads of a layer: the attention of the prompt's last query, a mean over
    query heads."""
    p, _ = prompt_of(pad)
    got = room.tova(p, CFG)
    assert got.shape == (L, 3, 1, p.n_context)
    want = attention(p, [p.T - 1]).mean(2, keepdim=True).expand(-1, -1, HKV, -1)
    torch.testing.assert_close(on_real(got, p), want, **CLOSE)


@pytest.mark.parametrize("pad", [(0, 0, 0), PAD], ids=["full", "padded"])
def test_keydiff_is_least_where_a_key_is_like_the_mean(pad):
    """1 less the cosine of a key and the mean of all of the prompt's keys, each of norm 1."""
    p, _ = prompt_of(pad)
    got = on_real(room.keydiff(p, CFG), p)
    for i in range(L):
        for b, first in enumerate(pad):
            for h in range(HKV):
                keys = [p.k[i][b, h, t].double() for t in range(first, p.T)]
                anchor = sum(k / k.norm() for k in keys) / len(keys)
                for t in range(first, p.n_context):
                    k = keys[t - first]
                    want = 1 - float(k @ anchor / k.norm() / anchor.norm())
                    assert math.isclose(got[i, b, h, t], want, rel_tol=1e-5, abs_tol=1e-6)


def rotation(position: int) -> torch.Tensor:
    """The matrix (D, D) float64 that RoPE applies at a position."""
    out = torch.zeros(D, D, dtype=torch.float64)
    for i in range(D // 2):
        angle = position * TINY.rope_theta ** (-2 * i / D)
        j = i + D // 2
        out[i, i] = out[j, j] = math.cos(angle)
        out[i, j] = -math.sin(angle)
        out[j, i] = math.sin(angle)
    return out


@pytest.mark.parametrize("pad, sinks", [((0, 0, 0), 0), (PAD, 4)], ids=["full", "padded"])
def test_closed_form_expected_attention_equals_loops(pad, sinks):
    """Mean and covariance of the queries before RoPE, turned by the mean rotation of the positions
    after the prompt that the context of 160 has; shares of exp(mean . k / sqrt(D) + k cov k / 2 D)
    among the tokens after the sinks, a mean over query heads, times the value's norm."""
    p, before = prompt_of(pad)
    got = on_real(room.expected_attention_closed(p, dataclasses.replace(CFG, sinks=sinks)), p)
    n = H // HKV
    for b, first in enumerate(pad[:2]):
        length = p.T - first
        turn = sum(rotation(t) for t in range(length, 160)) / (160 - length)
        for i in range(L):
            for h in range(H):
                queries = [before[i, b, h, t].double() for t in range(first + sinks, p.T)]
                mean = sum(queries) / len(queries)
                cov = sum(torch.outer(q - mean, q - mean) for q in queries) / len(queries)
                mean = turn @ mean
                cov = turn @ cov @ turn.T
                keys = p.k[i][b, h // n, first + sinks : p.n_context].double()
                weight = [math.exp(mean @ k / D**0.5 + k @ cov @ k / (2 * D)) for k in keys]
                values = p.z[i][b, h // n, first + sinks : p.n_context].double()
                for t, (w, v) in enumerate(zip(weight, values, strict=True), first + sinks):
                    got[i, b, h // n, t] -= w / sum(weight) * v.norm() / n
    assert got[:, :2].abs().max() < 2e-6
    assert not got[:, 2].any() or pad == (0, 0, 0)


# -------------------- what shares a budget


def test_tova_keeps_one_set_of_tokens_for_the_heads_of_a_layer():
    """Where a layer shares its budget, every head keeps the same floor(share * n) tokens, those the
    last query reads most over all heads, and all their groups, also where the layer's budget is no
    multiple of its heads."""
    model = tiny_model()
    cfg = SelectConfig(
        token_relevance="tova", token_keep=0.4, value_keep=1.0, allocation="layer", sinks=0
    )
    selector.attach(model, KVConfig(kv="select", n_groups=4), cfg, [tokens(2, 40)])
    p, _ = prompt_of(PAD, C=83, n_groups=4)
    choice = model.selector.choose(p)
    assert int(0.4 * (83 - PAD[1]) * HKV) % HKV  # a budget that is no multiple of the heads
    want = torch.zeros_like(choice.keep)
    seen = attention(p, [p.T - 1]).mean(2)
    for b, first in enumerate(PAD[:2]):
        n = int(0.4 * (83 - first))
        for i in range(L):
            order = sorted(range(first, 83), key=lambda t, s=seen[i, b]: -float(s[t]))
            want[i, b, :, order[:n]] = True
    assert torch.equal(choice.keep, want)
    assert torch.equal(choice.mask, want.unsqueeze(-1).expand_as(choice.mask))


def test_expected_attention_keeps_as_many_tokens_in_every_head():
    """As published every KV head keeps the same floor(share * n) tokens, the first four of the row
    among them."""
    model = tiny_model()
    way = SelectConfig(token_relevance="expected_attention_closed", token_keep=0.3, value_keep=1.0)
    cfg = as_published(way, frozenset())
    selector.attach(model, KVConfig(kv="select", n_groups=4), cfg, [tokens(2, 40)])
    p, _ = prompt_of(PAD, C=83, n_groups=4)
    keep = model.selector.choose(p).keep
    for b, first in enumerate(PAD[:2]):
        assert (keep[:, b].sum(-1) == int(0.3 * (83 - first))).all()
        assert keep[:, b, :, first : first + 4].all()
    assert keep.flatten(0, 2).any(0).sum() > keep[0, 0, 0].sum()  # each has its own


def test_rows_of_published_methods_have_their_own_allocation():
    """Without flags each method that drops tokens shares budgets and keeps first tokens as it was
    published; --allocation and --sinks, each for itself, decide where they are given; the
    project's own signals, and ways that drop no token, stay as they were."""
    names = ["observed", *PUBLISHED]
    cfg = EvalConfig(token_relevances=",".join(names), token_budgets="0.5,1", budgets="1")
    ways = ways_to_choose(cfg, SelectConfig())
    for given in ((), ("allocation",), ("sinks",)):
        got = [as_published(way, frozenset(given)) for way in ways]
        for before, way in zip(ways, got, strict=True):
            own = PUBLISHED.get(way.token_relevance, Published("global", 4))
            want = replace(before, **{k: v for k, v in own._asdict().items() if k not in given})
            assert way == want
    assert PUBLISHED["tova"] == ("layer", 0) and PUBLISHED["snapkv"] == ("head", 0)
    assert PUBLISHED["expected_attention_closed"] == ("head", 4)
    assert {w.token_relevance for w in ways} == {*names, ""}


# -------------------- Quest


def quest_model(dtype=torch.float64, read_tokens: int = 40, whole_layers: int = 1, **kv):
    """A tiny model of which the second layer reads by pages."""
    cfg = KVConfig(**{**dict(n_groups=4, topk_groups=4, kv_tail=3), **kv})
    return quest.attach(tiny_model(0, dtype), cfg, read_tokens, whole_layers, [tokens(2, 70)])


def read_by_pages(path: quest.QuestPath, q, k, v, read, n_pad) -> torch.Tensor:
    """What every token reads when it is decoded, (B, H, T, D), by loops. read(b, h, j, t): value of
    token j for a query of token t."""
    B, H, T, D = q.shape
    n = H // k.size(1)
    out = torch.zeros_like(q)
    for b in range(B):
        first = int(n_pad[b])
        for t in range(first, T):
            pages = [list(range(a, min(a + 16, t + 1))) for a in range(first, t + 1, 16)]
            for g in range(k.size(1)):
                heads = range(g * n, g * n + n)
                worth = torch.zeros(len(pages) - 1, dtype=torch.float64)
                for h in heads if pages[:-1] else ():
                    bounds = []
                    for page in pages[:-1]:
                        least, most = k[b, g, page].amin(0), k[b, g, page].amax(0)
                        limits = zip(q[b, h, t], least, most, strict=True)
                        bounds.append(sum(float(max(x * lo, x * hi)) for x, lo, hi in limits))
                    worth += (torch.tensor(bounds, dtype=torch.float64) / math.sqrt(D)).softmax(0)
                order = sorted(range(len(worth)), key=lambda i, w=worth: -float(w[i]))
                picked = [*order[: path.pages - 1], len(pages) - 1]
                seen = [j for i in picked for j in pages[i]]
                for h in heads:
                    p = torch.stack([q[b, h, t] @ k[b, g, j] for j in seen]) / math.sqrt(D)
                    values = torch.stack([read(b, g, j, t) for j in seen])
                    out[b, h, t] = p.softmax(0) @ values
    return out


def seen_by(path: torch.nn.Module, T: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random x (3, T, E), q, k, v of a path's shape, float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((TINY.n_embd,), (H, D), (HKV, D), (HKV, D))
    drawn = [torch.randn(3, T, *s, generator=g, dtype=torch.float64) for s in shapes]
    return drawn[0], *(t.transpose(1, 2) for t in drawn[1:])


@pytest.mark.parametrize("kept", [4, 2], ids=["whole values", "value groups"])
def test_quest_reads_the_pages_of_largest_bound(kept):
    """Three pages of 16, of which one is the newest and the others those with the largest share of
    softmax over bounds, a mean over the query heads of a KV head; token by token from each row's
    first one, and nothing of padding.
    With 2 of 4 value groups, groups are read of all but the newest 3 tokens."""
    path = quest.paths(quest_model(topk_groups=kept, read_tokens=50, value_basis="native"))[0]
    x, q, k, v = seen_by(path, 67)
    n_pad = torch.tensor([0, 5, 31])

    def read(b: int, g: int, j: int, t: int) -> torch.Tensor:
        value = v[b, g, j]
        if kept == 4 or t - j < 3:
            return value
        groups = value.view(4, -1)
        best = groups.square().sum(-1).topk(2).indices
        out = torch.zeros_like(groups)
        out[best] = groups[best]
        return out.flatten()

    want = read_by_pages(path, q, k, v, read, n_pad)
    with torch.no_grad():
        got = path(x, q, k, v, n_pad)
    for b, first in enumerate(n_pad.tolist()):
        torch.testing.assert_close(got[b, :, first:], want[b, :, first:])


def check_rows(model, x, want, caches, lengths, forgotten: int, n: int) -> None:
    """Joined caches of rows of x (3, T), each of its first lengths[b] tokens, put back after
    `forgotten` steps, give the logits want (3, T, V) in n steps, from the sixth on with two rows in
    another order."""
    cache = KVCache.cat(caches)
    before = cache.snapshot()
    for t in range(forgotten):
        model.decode(tokens(3, 1, seed=t), cache)
    cache.restore(before)
    rows = [0, 1, 2]
    for t in range(n):
        if t == 5:
            rows = [2, 0]
            cache = cache.select_sequences(rows)
        at = [lengths[b] + t for b in rows]
        got = model.decode(x[rows, at][:, None], cache)[:, 0]
        torch.testing.assert_close(got, want[rows, at])


@pytest.mark.parametrize("kept", [4, 2], ids=["whole values", "value groups"])
@pytest.mark.parametrize("read_tokens", [1, 33])
def test_quest_cached_equals_uncached(kept, read_tokens):
    """Decoding token by token, rows of several lengths together, gives the logits of the uncached
    forward; so it does after the cache was put back as it was, and its rows were parted, and where
    tokens come in a padded piece after the prompt."""
    model = quest_model(topk_groups=kept, read_tokens=read_tokens, whole_layers=0)
    x = tokens(3, 50)
    lengths = [34, 31, 14]
    with torch.no_grad():
        want = model(x)
        caches = []
        for b, n in enumerate(lengths):
            caches.append(model.new_cache(1, n if b else 50))
            got = read_in_pieces(model, x[b : b + 1, :n], caches[b], [1] * n)
            torch.testing.assert_close(got[0], want[b, :n])
        check_rows(model, x, want, caches, lengths, forgotten=6, n=16)
        cache = KVCache.cat(caches)
        pieces = torch.stack([x[b, n - 3 * b : n + 9 - 3 * b] for b, n in enumerate(lengths)])
        pad = torch.tensor([0, 3, 6])
        got = model.prefill(pieces, cache, pad, last_only=False)
        for b, n in enumerate(lengths):
            torch.testing.assert_close(got[b, 3 * b :], want[b, n : n + 9 - 3 * b])


def test_quest_rolled_back_has_the_bounds_of_what_is_left():
    """truncate forgets keys in the middle of a page, and their bounds with them."""
    model = quest_model(read_tokens=20)
    x = tokens(2, 60)
    cache = model.new_cache(2, 60)
    again = model.new_cache(2, 60)
    with torch.no_grad():
        model.prefill(x, cache)
        cache.truncate(37)
        model.prefill(x[:, :37], again)
    for name in ("page_low", "page_high"):
        a, b = (getattr(c.layers[1], name) for c in (cache, again))
        torch.testing.assert_close(a, b)
        assert a.isfinite().sum() == 2 * 3 * HKV * D


def test_quest_that_reads_everything_is_dense():
    """With a budget of all tokens logits are those of the dense model, cached and uncached."""
    model = quest_model(read_tokens=80)
    x = tokens(2, 77)
    with torch.no_grad():
        want = tiny_model()(x)
        torch.testing.assert_close(model(x), want)
        cache = model.new_cache(2, 77)
        got = read_in_pieces(model, x, cache, [40, 1, 20, *[1] * 16])
    torch.testing.assert_close(got, want)


def test_quest_counts_what_it_holds_and_reads():
    """Bytes are those of all keys and values, of the counts, and of two bounds a page in the layer
    that picks; a step reads all bounds, a page's as much as a token, the newest page as far as it
    is filled, two whole ones, and everything in the other layer."""
    model = quest_model(torch.float32, read_tokens=50)
    with torch.no_grad():
        cache = model.new_cache(2, 70)
        model.prefill(tokens(2, 70), cache)
    numbers = 2 * 2 * 70 * HKV * D * 2 + 2 * 5 * HKV * D * 2
    assert cache.nbytes() == 4 * numbers + 2 * 2 * 8
    assert quest.reads(model, 70) == (70 + 6 + 32 + 5) / 140
    assert quest.reads(model, 64) == (64 + 48 + 4) / 128
    assert quest.reads(model, 5) == (5 + 5 + 1) / 10


def test_quest_refuses_what_it_cannot_read():
    """Integers, and no layer left to pick in, each with one line."""
    assert "key_bits=4" in error_line(quest_model, key_bits=4, value_bits=4, topk_groups=2)
    assert "at most 1" in error_line(quest_model, whole_layers=2)


# -------------------- KIVI

SMALL = dict(group=8, residual=16)


def kivi_model(bits: int = 2, dtype=torch.float64, cfg=TINY, **fmt):
    """A tiny model that stores KIVI's codes, in small groups."""
    return kivi.attach(tiny_model(0, dtype, cfg), kivi.Format(bits, **{**SMALL, **fmt}))


def rounded(numbers: list[float], bits: int) -> list[float]:
    """Numbers that share a step, as they are read: step and least number in float16."""
    low = min(numbers)
    step = float(np.float16(max((max(numbers) - low) / (2**bits - 1), 2.0**-24)))
    low = float(np.float16(low))
    codes = [min(max(round((x - low) / step), 0), 2**bits - 1) for x in numbers]
    return [code * step + low for code in codes]


@pytest.mark.parametrize("bits", kivi.BITS)
def test_kivi_reads_codes_and_a_whole_residual(bits):
    """Token t of a row reads keys before the last multiple of 16 tokens by channel in groups of 8
    tokens, values older than the newest 16 by token in groups of 8 channels, and the rest whole;
    groups count from each row's first token."""
    path = kivi_model(bits).layers[0].self_attn.kv_path
    x, q, k, v = seen_by(path, 43)
    n_pad = torch.tensor([0, 5, 30])
    want = torch.zeros_like(q)
    for b, first in enumerate(n_pad.tolist()):
        old_k = k.clone()
        old_v = v.clone()
        for g in range(HKV):
            for a in range(first, 43 - 7, 8):
                for d in range(D):
                    read = rounded(k[b, g, a : a + 8, d].tolist(), bits)
                    old_k[b, g, a : a + 8, d] = torch.tensor(read)
            for t in range(first, 43):
                for d in (0, 8):
                    old_v[b, g, t, d : d + 8] = torch.tensor(
                        rounded(v[b, g, t, d : d + 8].tolist(), bits)
                    )
        for t in range(first, 43):
            n = t - first
            for h in range(H):
                g = h // (H // HKV)
                keys = [
                    (old_k if j - first < n // 16 * 16 else k)[b, g, j] for j in range(first, t + 1)
                ]
                values = [(old_v if j < t - 16 else v)[b, g, j] for j in range(first, t + 1)]
                p = (torch.stack(keys) @ q[b, h, t] / math.sqrt(D)).softmax(0)
                want[b, h, t] = p @ torch.stack(values)
    got = path(x, q, k, v, n_pad)
    for b, first in enumerate(n_pad.tolist()):
        torch.testing.assert_close(got[b, :, first:], want[b, :, first:])


@pytest.mark.parametrize("bits", kivi.BITS)
def test_kivi_cached_equals_uncached(bits):
    """Token by token, rows of several lengths together, a cache gives the logits of the uncached
    forward; so it does after it was put back as it was, and its rows were parted."""
    model = kivi_model(bits)
    x = tokens(3, 60)
    lengths = [38, 32, 9]
    with torch.no_grad():
        want = model(x)
        caches = []
        for b, n in enumerate(lengths):
            caches.append(model.new_cache(1, n if b else 60))
            got = read_in_pieces(model, x[b : b + 1, :n], caches[b], [1] * n)
            torch.testing.assert_close(got[0], want[b, :n])
        check_rows(model, x, want, caches, lengths, forgotten=22, n=22)


def test_kivi_stores_a_prompt_the_same_however_it_is_cut():
    """A padded batch of prompts, read whole or token by token, leaves the same codes, steps and
    windows, and each row those it has alone; a file brings them back."""
    path = kivi_model().layers[0].self_attn.kv_path
    x, q, k, v = seen_by(path, 61)
    n_pad = torch.tensor([0, 7, 50])
    whole = path.new_cache(3, 61, k)
    path.prefill(x, q, k, v, whole, n_pad)
    pieces = path.new_cache(3, 1, k)
    for t in range(61):
        new = (u[:, :, t : t + 1] for u in (q, k, v))
        path.prefill(x[:, t : t + 1], *new, pieces, (n_pad - t).clamp(0, 1))
    loaded = path.new_cache(3, 1, k)
    loaded.load_state_dict(whole.state_dict())
    for b, first in enumerate(n_pad.tolist()):
        alone = path.new_cache(1, 61 - first, k)
        path.prefill(x[b : b + 1, first:], *(u[b : b + 1, :, first:] for u in (q, k, v)), alone)
        want = alone.view().window
        n = 61 - first
        for cache in (whole, pieces, loaded, whole.select_sequences([0, 1, 2])):
            got = cache.view().window
            assert int(got.count[b]) == n
            assert torch.equal(got.k[b, :, :n], want.k[0]) and torch.equal(
                got.v[b, :, :n], want.v[0]
            )


def test_kivi_rolls_back_between_groups():
    """truncate leaves what became codes in codes, refuses to cut a group of keys, and reading goes
    on from there."""
    path = kivi_model().layers[0].self_attn.kv_path
    x, q, k, v = seen_by(path, 60)
    cache = path.new_cache(3, 60, k)
    path.prefill(x, q, k, v, cache)
    before = cache.view().window
    assert "share steps by 8" in error_line(cache.truncate, 45)
    cache.truncate(40)
    assert cache.lengths.tolist() == [40] * 3
    path.prefill(x[:, :33], *(u[:, :, :33] for u in (q, k, v)), cache)
    got = cache.view().window
    assert torch.equal(got.k[:, :, :40], before.k[:, :, :40])
    assert torch.equal(got.v[:, :, :40], before.v[:, :, :40])
    keys = kivi.dequantise(*kivi.quantise(kivi.by_channel(k[:, :, :32], 8), 2), k.dtype)
    assert torch.equal(got.k[:, :, 40:72], keys.mT.flatten(2, 3))
    assert torch.equal(got.k[:, :, 72:], k[:, :, 32:33])


def test_kivi_with_a_residual_of_everything_is_dense():
    """While everything fits the residual, logits are those of the dense model."""
    model = kivi_model(residual=80)
    x = tokens(2, 77)
    with torch.no_grad():
        want = tiny_model()(x)
        torch.testing.assert_close(model(x), want)
        cache = model.new_cache(2, 77)
        torch.testing.assert_close(read_in_pieces(model, x, cache, [40, 1, 20, *[1] * 16]), want)


def test_kivi_counts_the_bytes_of_its_paper():
    """At 2 bits in groups of 32 with 128 tokens whole, 256 tokens of 64 channels hold codes of 2
    bits, 2 times 16 bits for every 32 numbers, and room for 128 whole tokens."""
    cfg = replace(TINY, head_dim=64, block_size=300)
    model = kivi_model(2, torch.float32, cfg, group=32, residual=128)
    cache = model.new_cache(1, 256)
    with torch.no_grad():
        model.prefill(tokens(1, 256), cache)
    numbers = 256 + 128  # tokens in codes: all keys, and the values before the residual
    codes = 2 * HKV * numbers * 64 * 2 // 8
    steps = 2 * HKV * numbers * 64 // 32 * 4
    whole = 2 * HKV * 2 * 128 * 64 * 4
    assert cache.nbytes() == codes + steps + whole + 2 * 3 * 8


def test_kivi_refuses_what_does_not_fit():
    """Bits, groups and residual that it does not have, each with one line."""
    assert "4 or 2" in error_line(kivi_model, 3)
    assert "head_dim=16" in error_line(kivi_model, group=32, residual=32)
    assert "residual of 12" in error_line(kivi_model, residual=12)


@pytest.mark.parametrize("kind", ["quest", "quest, groups", "kivi"])
def test_caches_of_rivals_in_files(kind, tmp_path):
    """A file brings a cache back for its model: the same bytes, and the same logits after it; not
    for a model that stores otherwise."""
    make = kivi_model if kind == "kivi" else quest_model
    model = make(topk_groups=2) if kind == "quest, groups" else make()
    cache = model.new_cache(2, 60)
    x = tokens(2, 50)
    with torch.no_grad():
        model.prefill(x, cache)
        cache.save(tmp_path / "cache", model)
        loaded = KVCache.load(tmp_path / "cache", model)
        assert loaded.nbytes() == cache.nbytes()
        for _ in range(3):
            a, b = (model.decode(x[:, :1], c) for c in (cache, loaded))
            assert torch.equal(a, b)
    assert "is not a cache of this model" in error_line(
        KVCache.load, tmp_path / "cache", tiny_model()
    )


# -------------------- rows of eval.py


@pytest.fixture(scope="module")
def wide(tmp_path_factory, text):
    """A base of three layers with heads of 32 channels and a context of 192 tokens."""
    folder = tmp_path_factory.mktemp("wide")
    flags = ["--n_layer=3", "--head_dim=32", "--block_size=192", "--pretrain_steps=2"]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return pretrain(folder / "run", text, "--pretrain_batch_size=2", *flags)


def measured(base, text: str, given=(), kv: dict | None = None, **cfg) -> list[dict]:
    """eval.py's rows of a base with weights that are large enough to tell settings apart, a context
    of 152 tokens and 8 behind it."""
    small = dict(dataset=text, sequences=3, calibration=2, device="cpu", query=5, continuation=8)
    cfg = EvalConfig(**{**small, "block_size": 160, "tasks": "continuation", **cfg})
    asked = Asked(eval=cfg, kv=KVConfig(**(kv or {})), given=frozenset(given))
    run = load_run(base)
    torch.manual_seed(0)
    randomise(run.model, 0.2)
    return evaluation.evaluate(run, asked)[0]


def test_rows_of_rivals_say_what_they_hold_and_read(wide, text, own_cache):
    """Quest holds all keys and values and two bounds for every 16 tokens of the layers that pick,
    and reads what its budget says; with value groups it holds those. KIVI holds codes. Each is
    compared with the base's own value, has its allocation and share in the table, and leaves the
    model as it was."""
    rows = measured(
        wide, text, methods="dense,quest,kivi", token_budgets="0.5,0.22", budgets="1,0.5"
    )
    assert [r["method"] for r in rows] == ["dense", *["quest"] * 4, "kivi", "kivi"]
    dense = rows[0]
    alone = measured(wide, text, methods="kivi,quest", token_budgets="0.22", kv_bits="2")
    for r in rows[1:]:
        assert r["dense_value"] == dense["value"] == alone[0]["dense_value"]
        assert r["kl"] > 0 and r["value"] != dense["value"]
    for name in ("value", "kl", "cache_bytes", "setting"):
        assert alone[0][name] == rows[3][name] and alone[1][name] == rows[6][name]
    token = 2 * 2 * 32 * 2  # of one layer in 16 bits: keys and values of two heads
    bounds = 10 * token  # two for each of 10 pages
    count = 3 * 3 * 8
    for r, pages in zip(rows[1:5], (4, 4, 2, 2), strict=True):
        assert r["allocation"] == "head"
        assert r["reads"] == (2 * 152 + 8 + 16 * (pages - 1) + 10) / (3 * 152)
        assert f"head reads {r['reads']:.1%}" in r["setting"]
    whole = [r for r in rows[1:5] if r["value_keep"] == 1]
    groups = [r for r in rows[1:5] if r["value_keep"] == 0.5]
    assert len(whole) == len(groups) == 2
    for r in whole:
        assert r["of_dense"] == (3 * (3 * 152 * token) + 3 * bounds + count) / (9 * 152 * token)
        assert r["n_groups"] == 1
    for r in groups:
        assert r["of_dense"] < 0.85 and r["n_groups"] == 4 and "output S=4 K=2" in r["setting"]
    assert [(r["key_bits"], r["value_bits"]) for r in rows[5:]] == [(4, 4), (2, 2)]
    assert "groups of 32, 128 whole keys:2 values:2" in rows[6]["setting"]
    table = result_table(rows)
    assert all(r["setting"] in table for r in rows[1:])
    assert f"{rows[6]['value'] - dense['value']:+.4f}" in table.splitlines()[-1]


def test_perplexity_of_rivals_is_that_of_decoding(wide, text, own_cache):
    """Perplexity rows read every token as decoding would: exp of the mean loss of the uncached
    forward, with value groups of the newest tokens whole as the setting says. What one task leaves
    is the model as it was: the base's own values of the next."""
    asked = dict(tasks="perplexity", methods="quest,kivi", token_budgets="0.1", kv_bits="4")
    rows = measured(wide, text, budgets="0.5", kv=dict(kv_tail=2), **asked)
    assert [r["method"] for r in rows] == ["quest", "kivi"]
    assert all(r["value"] != r["dense_value"] and r["prefill"] == "routed" for r in rows)
    two = dict(tasks="perplexity,continuation")
    dense = [r["value"] for r in measured(wide, text, methods="dense", **two)]
    for rival in (dict(methods="kivi", kv_bits="2"), dict(methods="quest", token_budgets="0.1")):
        assert [r["dense_value"] for r in measured(wide, text, **rival, **two)] == dense


def test_flags_that_rivals_cannot_be_asked(wide, text, own_cache):
    """Quest without a share to read, bits that KIVI has not, more layers than there are, and a run
    that stores in its own way, each with one line."""
    for flags, why in (
        (dict(methods="quest"), "give --token_budgets"),
        (dict(methods="kivi", kv_bits="4,8"), "kv_bits=8 with methods=kivi"),
        (dict(methods="quest", token_budgets="0.5", quest_whole=3), "at most 2"),
    ):
        assert why in error_line(measured, wide, text, **flags)
    line = error_line(measured, wide, text, {"token_budgets"}, methods="kivi", token_budgets="0.5")
    assert "only kv=select chooses" in line
    run = replace(load_run(wide), kv=KVConfig(kv="value_groups"))
    asked = Asked(eval=EvalConfig(methods="kivi"))
    assert "give its base" in error_line(rivals_of, run, asked, ["kivi"])


@pytest.mark.parametrize(
    "rival",
    [
        Rival("quest", KVConfig(kv="dense"), 0.5),
        Rival("quest", KVConfig(), 0.5),
        Rival("kivi", KVConfig(kv="dense", key_bits=2, value_bits=2)),
    ],
    ids=["quest", "quest, groups", "kivi"],
)
def test_rival_is_in_place_for_a_while(rival):
    """Inside the `with` the model stores and reads as the rival does, the window of value groups
    the task's; after it, an exception included, it is dense."""
    model = tiny_model(cfg=replace(TINY, head_dim=32))
    task = SimpleNamespace(stored=tokens(1, 40), query=5)
    with pytest.raises(KeyError), in_place(model, rival, task, 1, [tokens(2, 40)], 0) as kv:
        assert method_of(model, kv) == rival.method
        assert not rival.cuts_values or quest.paths(model)[0].cfg.kv_tail == kv.kv_tail == 5
        assert rival.method == "kivi" or quest.paths(model)[0].pages == 1
        raise KeyError
    assert {type(block.self_attn.kv_path) for block in model.layers} == {DensePath}
