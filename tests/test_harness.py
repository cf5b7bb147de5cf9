"""What lm-evaluation-harness asks of tasks/harness.py. The harness itself need not be installed:
the few names of it that are used have stand-ins here."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import TINY, error_line, grouped_model, tiny_model, tokens

from config import KVConfig, SelectConfig
from loaders.runs import attach_storage
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
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.utils")
    parts = {name: ModuleType(name) for name in names}
    parts["lm_eval.api.model"].TemplateLM = type("TemplateLM", (), {})
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


def selecting_model(keep: float = 0.3):
    """A model of the letters that keeps a share of a prompt's keys and values."""
    cfg = replace(TINY, vocab_size=27)
    how = KVConfig(kv="select", kv_tail=2)
    batches = [tokens(2, 60, vocab=27)]
    return attach_storage(tiny_model(cfg=cfg), how, SelectConfig(kv_keep=keep), batches)


def exact_groups():
    """Value groups whose prompt is read whole and then cut."""
    return grouped_model(prefill="exact")


def read_context(model, context: list[int], room: int):
    """All of a context but its last token as a prompt, then that token from what is kept: logits
    (1, 1, vocab) and the cache. One token has nothing before it."""
    cache = model.new_cache(1, len(context) + room)
    if len(context) == 1:
        return model.prefill(torch.tensor([context]), cache), cache
    model.prefill(torch.tensor([context[:-1]]), cache)
    return model.decode(torch.tensor([context[-1:]]), cache), cache


MAKERS = {"dense": tiny_model, "value_groups": exact_groups, "select": selecting_model}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_answers_are_scored_as_generation_reads_them(make, harness):
    """Answers of several lengths to three contexts, one longer than the model's and one of a single
    token: each as a loop of its own scores it, the last token of the context and the answer read
    one after the other from what is kept of the others, in the order asked."""
    model = make()
    asked = harness.CachedModel(model, Letters(), rows=2)
    first = [1, 2, 3, 4, 5, 17, 3, 8, 2, 9]
    long = [i % 20 for i in range(model.cfg.block_size + 9)]
    requests = [(first, [7, 8]), (long, [3]), (first, [2, 9, 11, 4]), (first, [6]), (long, [5, 1])]
    requests.append(([26], [4, 4, 2]))
    with evaluating(model):
        likeliest = int(read_context(model, first, 1)[0][0, -1].argmax())
    requests.insert(0, (first, [likeliest]))  # greedy, padded beside a longer one
    got = asked._loglikelihood_tokens([(None, *r) for r in requests], disable_tqdm=True)
    for (context, answer), (score, greedy) in zip(requests, got, strict=True):
        context = context[-(model.cfg.block_size - len(answer) + 1) :]
        want, likeliest = 0.0, []
        with evaluating(model):
            logits, cache = read_context(model, context, len(answer))
            for i in answer:
                log_p = logits[0, -1].log_softmax(-1)
                want += float(log_p[i])
                likeliest.append(int(log_p.argmax()) == i)
                if len(likeliest) < len(answer):
                    logits = model.decode(torch.tensor([[i]]), cache)
        assert score == pytest.approx(want, rel=1e-9) and greedy == all(likeliest)
    assert got[0][1]
    (blank,) = asked._loglikelihood_tokens([(None, [], [4, 4, 2])], disable_tqdm=True)
    assert blank == got[-1]


def test_an_answer_of_one_token_comes_from_what_is_kept(harness):
    """Two budgets of kv=select score the one token of an answer differently, and what is generated
    begins with the likeliest token after what each keeps."""
    context = [(i * i + i) % 26 for i in range(60)]
    found = []
    for keep in (0.05, 0.9):
        model = selecting_model(keep)
        asked = harness.CachedModel(model, Letters())
        ((score, _),) = asked._loglikelihood_tokens([(None, context, [7])], disable_tqdm=True)
        with evaluating(model):
            likeliest = int(read_context(model, context, 1)[0][0, -1].argmax())
        text = asked.answer(Letters().decode(context), {"max_gen_toks": 1})
        assert likeliest < 26 and text == Letters().decode([likeliest])
        found.append((score, text))
    (low, first), (high, second) = found
    assert abs(low - high) > 0.01 and first != second


def test_answers_longer_than_the_model_are_refused(harness):
    """An answer that leaves no token for the context is one line, not a slice that turns round;
    the longest that leaves one is answered."""
    model = tiny_model(cfg=replace(TINY, vocab_size=27, block_size=12))
    asked = harness.CachedModel(model, Letters())
    for n in (0, 12, 40):
        said = error_line(asked.answer, "abc", {"max_gen_toks": n})
        assert f"max_gen_toks={n}:" in said and "give a smaller max_gen_toks" in said
    settings = {"max_gen_toks": 11}
    assert asked.answer("abc", settings) == asked.answer("c", settings)
    (one,) = asked._loglikelihood_tokens([(None, [1, 2], [3] * 12)], disable_tqdm=True)
    assert one == asked.scores([2], [[3] * 12])[0]
    request = (None, [1, 2], [3] * 13)
    said = error_line(asked._loglikelihood_tokens, [request], disable_tqdm=True)
    assert "an answer of 13 tokens" in said and "12 tokens" in said


def test_texts_are_scored_whole_and_answers_end_at_a_stop_string(harness, monkeypatch):
    """A rolling score is the sum over all tokens of a text after the prefix, taken in pieces; an
    answer is the greedy one, cut before the first stop string."""
    monkeypatch.setattr(harness, "PIECE", 2)
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
