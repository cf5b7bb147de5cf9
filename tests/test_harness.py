"""What lm-evaluation-harness asks of tasks/harness.py. The harness itself need not be installed:
the few names of it that are used have stand-ins here."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import TINY, grouped_model, tiny_model

from model import evaluating


class Letters:
    """Texts of the letters a to z, ids 0 to 25; 26 ends a text."""

    eot = 26
    ends = (26,)
    bos = None
    vocab_size = 27

    def encode(self, text):
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i) if i < 26 else "#" for i in ids)


@pytest.fixture
def harness(monkeypatch):
    """tasks.harness over stand-ins for the harness; a window is a whole text."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry", "lm_eval.utils")
    parts = {name: ModuleType(name) for name in names}
    parts["lm_eval.api.model"].TemplateLM = type("TemplateLM", (), {})
    parts["lm_eval.api.registry"].register_model = lambda name: lambda cls: cls
    parts["lm_eval.utils"].make_disjoint_window = lambda pair: pair
    parts["lm_eval.utils"].get_rolling_token_windows = lambda ids, prefix, most, n: [
        ([prefix], ids)
    ]
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tasks.harness", raising=False)
    from tasks import harness

    yield harness
    sys.modules.pop("tasks.harness", None)


@pytest.mark.parametrize("make", [tiny_model, grouped_model], ids=["dense", "value_groups"])
def test_answers_are_scored_as_generation_reads_them(make, harness):
    """Answers of several lengths to two contexts, one of which is longer than the model's: each as
    a loop of its own scores it, one prompt, one token after the other, in the order asked."""
    model = make()
    asked = harness.CachedModel(model, Letters(), rows=2)
    first = [1, 2, 3, 4, 5]
    long = [i % 20 for i in range(model.cfg.block_size + 9)]
    requests = [(first, [7, 8]), (long, [3]), (first, [2, 9, 11, 4]), (first, [6]), (long, [5, 1])]
    got = asked._loglikelihood_tokens([(None, *r) for r in requests], disable_tqdm=True)
    for (context, answer), (score, greedy) in zip(requests, got, strict=True):
        context = context[-(model.cfg.block_size - len(answer) + 1) :]
        want, likeliest = 0.0, []
        with evaluating(model):
            cache = model.new_cache(1, len(context) + len(answer))
            logits = model.prefill(torch.tensor([context]), cache)
            for i in answer:
                log_p = logits[0, -1].log_softmax(-1)
                want += float(log_p[i])
                likeliest.append(int(log_p.argmax()) == i)
                if len(likeliest) < len(answer):
                    logits = model.decode(torch.tensor([[i]]), cache)
        assert score == pytest.approx(want, rel=1e-9) and greedy == all(likeliest)


def test_texts_are_scored_whole_and_answers_end_at_a_stop_string(harness, monkeypatch):
    """A rolling score is the sum over all tokens of a text after the prefix; an answer is the
    greedy one, cut before the first stop string."""
    model = tiny_model(cfg=replace(TINY, vocab_size=27))
    asked = harness.CachedModel(model, Letters())
    (score,) = asked.loglikelihood_rolling([SimpleNamespace(args=("hello",))], disable_tqdm=True)
    ids = Letters().encode("hello")
    with evaluating(model):
        log_p = model(torch.tensor([[26, *ids[:-1]]])).log_softmax(-1)[0]
    assert score == pytest.approx(sum(float(log_p[t, i]) for t, i in enumerate(ids)))
    whole = asked.answer("hello", {"max_gen_toks": 12})
    assert len(whole) > 4
    stop = whole[2:4]
    steps = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *args: (steps.append(1), decode(*args))[1])
    request = SimpleNamespace(args=("hello", {"until": [stop, "!"], "max_gen_toks": 12}))
    (cut,) = asked.generate_until([request], disable_tqdm=True)
    assert cut == whole[: whole.index(stop)]
    assert len(steps) < 11  # it ended there
