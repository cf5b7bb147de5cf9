"""Training a selector's predictors: the loss falls, the base stays, and windows are cut, repeated
and shared out as said."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from choosing import PREDICTORS, W, config, selecting
from helpers import TINY, error_line, tiny_model, tokens

from selection.training import (
    PASSAGE,
    cut,
    predictor_loss,
    question_window,
    recall_window,
    targets,
    training_example,
    training_windows,
    window_kind,
)


@pytest.mark.parametrize("kind", ["mse", "kl"])
@pytest.mark.parametrize("scope", ["shared", "head"])
def test_training_lowers_the_loss_and_leaves_the_base(scope, kind):
    """A few AdamW steps on one batch lower each predictor's own loss, the sum is that of the parts,
    and the base gets no gradient."""
    for name in PREDICTORS.split(","):
        m = selecting(scope, cfg=config(predictors=name, predictor_loss=kind), fold=False)
        idx = tokens(3, 70, seed=9)
        (p,) = m.selector.predictors.values()
        optimizer = torch.optim.AdamW(p.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            losses.append(predictor_loss(m, idx))
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.95 * losses[0] and all(
            a > b for a, b in itertools.pairwise(losses)
        ), losses
        assert all(w.grad is None for n, w in m.named_parameters() if not n.startswith("selector."))
    m = selecting(scope, cfg=config(predictor_loss=kind), fold=False)
    prompt, alpha = training_example(m, idx)
    want = targets(m.selector, prompt, alpha)
    parts = (
        p.loss(prompt, want[n], m.selector.cfg if n == "predictor_query" else kind)
        for n, p in m.selector.predictors.items()
    )
    torch.testing.assert_close(predictor_loss(m, idx), sum(parts))
    energy = torch.stack(prompt.z).unflatten(-1, (4, 4)).square().sum(-1)
    alike, over = (
        (alpha, energy)
        if scope == "head"
        else (alpha.mean((0, 2))[None, :, None], energy.mean((0, 2))[None, :, None])
    )
    torch.testing.assert_close(want["predictor"], alike.unsqueeze(-1) * over.sqrt().float())
    assert torch.equal(want["predictor_query"], alpha) and torch.allclose(
        want["expected_attention"], alike.unsqueeze(-1)
    )
    assert prompt.n_context == 70 - 20 - W and prompt.T == 50 and alpha.shape == (2, 3, 3, 41)
    assert "some context must be left" in error_line(predictor_loss, m, idx[:, :29])


@pytest.mark.parametrize("n_tokens, region", [(200, 16), (203, 5), (70, 9), (41, 0), (40, 19)])
def test_recall_windows_repeat_every_passage_of_the_context(n_tokens, region):
    """The first half stays; after it come all passages of its context, none of the query region's
    tokens, in one order of all possible, again from the first where there is room, and the same on
    every call."""
    window = torch.randperm(n_tokens)
    made = recall_window(window, region).tolist()
    half = n_tokens // 2
    assert made[:half] == window[:half].tolist()
    context = made[: half - region]
    passages = [context[i : i + PASSAGE] for i in range(0, len(context), PASSAGE)]
    orders = ([t for p in order for t in p] * 40 for order in itertools.permutations(passages))
    assert made[half:] in [order[: n_tokens - half] for order in orders]
    assert made == recall_window(window, region).tolist()


def test_recall_windows_refuse_a_half_that_is_all_query_region():
    assert "give a larger --block_size, or --recall=0" in error_line(
        recall_window, torch.arange(40), 20
    )


@pytest.mark.parametrize("n_tokens, region", [(200, 16), (203, 5), (82, 9), (64, 0)])
def test_question_windows_end_with_a_part_of_what_stands_before(n_tokens, region):
    """The last region + PASSAGE tokens are neighbours that all lie in what comes before them, which
    stays as it was; the same ones on every call. A window too short for that is refused."""
    window = torch.randperm(n_tokens)
    made = question_window(window, region).tolist()
    n_asked = region + PASSAGE
    before = window[:-n_asked].tolist()
    assert made[:-n_asked] == before
    places = range(len(before) - n_asked + 1)
    assert made[-n_asked:] in [before[i : i + n_asked] for i in places]
    assert made == question_window(window, region).tolist()
    short = window[: 2 * n_asked - 1]
    assert "give a larger --block_size, or --recall=0" in error_line(question_window, short, region)


@pytest.mark.parametrize("prefill", ["exact", "routed"])
def test_the_tokens_observed_are_those_asked_for(prefill, monkeypatch):
    """cfg.observers reaches every prompt that is chosen from, trained on or looked at, and with as
    many as stay whole nothing changes."""
    m = selecting(prefill=prefill, cfg=config(observers=30), fold=False)
    idx = tokens(2, 70, seed=4)
    seen = []
    choose = m.selector.choose
    monkeypatch.setattr(m.selector, "choose", lambda p: (seen.append(p), choose(p))[1])
    with torch.no_grad():
        m.prefill(idx, m.new_cache(2, 80))
        assert seen and {len(p.asking) for p in seen} == {30}
        assert len(training_example(m, idx)[0].asking) == 30
        caches = [m.new_cache(2, 80) for _ in range(2)]
        for cache, cfg in zip(caches, (config(observers=W), config()), strict=True):
            m.selector.set(cfg)
            m.prefill(idx, cache)
        after = [m.decode(idx[:, :1], cache) for cache in caches]
    assert torch.equal(*after)


def test_windows_are_cut_into_equal_parts_down_to_the_shortest():
    """A window is read in order, in parts of one length: the whole, or a half, a quarter, ... of it
    that has at least `shortest` tokens; every one of these turns up, the same for the same window;
    with 0 only the whole."""
    lengths = set()
    for window in tokens(60, 50):
        made = cut(window, 12)
        lengths.add(made.size(1))
        assert made.numel() <= 50 < made.numel() + len(made)
        assert made.flatten().tolist() == window[: made.numel()].tolist()
        assert torch.equal(made, cut(window, 12))
        assert torch.equal(cut(window, 0)[0], window) and torch.equal(cut(window, 26)[0], window)
    assert lengths == {50, 25, 12}


def test_window_kinds_are_shares_by_their_own_tokens():
    """Of many windows about cfg.recall are no continuation, a third of these are questions, and
    always the same ones; none at 0, no continuation at 1."""
    windows = tokens(600, 12, seed=3)
    kinds = [window_kind(w, 0.6) for w in windows]
    assert 190 < kinds.count("continuation") < 290
    assert 80 < kinds.count("question") < 160
    assert kinds == [window_kind(w, 0.6) for w in windows]
    assert {window_kind(w, 0.0) for w in windows} == {"continuation"}
    assert {window_kind(w, 1.0) for w in windows} == {"question", "recall"}


def test_predictor_loss_is_the_mean_over_windows_of_all_kinds():
    """Each window counts alike, whichever kinds it is cut into and however a batch is split: the loss
    of a batch is the mean of those of its windows, each the mean of its parts, made one by one, in
    which the right tokens read."""
    model = tiny_model(cfg=replace(TINY, block_size=200))
    m = selecting("head", model=model, cfg=config(recall=0.75, shortest=90), fold=False)
    idx = tokens(7, 182, seed=5)
    seen = Counter()
    want = 0.0
    for whole in idx:
        windows = cut(whole, 90)
        for window in windows:
            kind = window_kind(window, 0.75)
            seen[kind, len(windows)] += 1
            if kind == "recall":
                window = recall_window(window, W)
            elif kind == "question":
                window = question_window(window, W)
            readers = {"recall": len(window) // 2, "question": PASSAGE, "continuation": 20}[kind]
            readers += kind == "recall" and len(window) % 2
            prompt, alpha = training_example(m, window[None], readers)
            assert len(window) - readers == prompt.T == prompt.n_context + W
            wanted = targets(m.selector, prompt, alpha)
            for name, p in m.selector.predictors.items():
                how = m.selector.cfg if name == "predictor_query" else "mse"
                want = want + p.loss(prompt, wanted[name], how) / len(windows) / 7
    assert len(seen) > 4, seen
    torch.testing.assert_close(predictor_loss(m, idx), want)
    halves = predictor_loss(m, idx[:2]) * 2 + predictor_loss(m, idx[2:]) * 5
    torch.testing.assert_close(predictor_loss(m, idx), halves / 7)
    made = training_windows(idx, m.selector.cfg, W)
    assert sum(part.share for part in made) == pytest.approx(1)
    assert sum(len(part.windows) for part in made) == sum(seen.values())
