"""Instructions with answers: how they are written, trained on and scored; ROUGE-L against a loop."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, grouped_model, tiny_model, tokens

import eval as evaluation
import train
from data import batch, prepare, sequential
from loaders.examples import LEFT_OUT, Examples
from loaders.instructions import Example, Template, instruct_corpus, read_examples
from loaders.templates import ChatFiles
from loaders.tokenizer import ByteTokenizer
from measure_config import EvalConfig
from runs import arguments, call, losses, pretrain
from settings.train import DataConfig
from tasks.instruct import instruct
from tasks.make import make_tasks
from tasks.rouge import rouge_l, words
from tasks.text import answers_loss, mean_loss

pytestmark = pytest.mark.usefixtures("own_cache")


def write(folder: Path, n: int = 40, first: int = 0) -> str:
    """instruct:PATH of n examples of many lengths, numbered from `first`."""
    rows = []
    for i in range(first, first + n):
        row = {"instruction": f"Say {i}{'!' * (i % 7)}", "output": f"{i} " * (1 + i % 5)}
        if i % 2:
            row |= {"input": f"about {i}", "task": f"odd{i % 3}"}
        rows.append(json.dumps(row))
    path = folder / "lines.jsonl"
    path.write_text("\n".join(rows))
    return f"instruct:{path}"


# ----------------------------------------------------------------------------- ROUGE-L


def common_by_force(a: list[str], b: list[str]) -> int:
    """The longest common subsequence: every subsequence of a, the long ones first."""
    for n in range(len(a), 0, -1):
        for picked in itertools.combinations(a, n):
            rest = iter(b)
            if all(word in rest for word in picked):
                return n
    return 0


def texts(n: int) -> list[tuple[str, str]]:
    """Pairs of texts of few words, with marks between."""
    rng = random.Random(1)

    def text() -> str:
        return rng.choice((" ", "-")).join(
            rng.choices(["The", "cat's", "ÉT", "7", "b,"], k=rng.randrange(8))
        )

    return [(text(), text()) for _ in range(n)]


def test_rouge_l_equals_brute_force():
    """F-measure of the longest common subsequence that trying every one finds."""
    for a, b in texts(150):
        ours = words(a)
        theirs = words(b)
        common = common_by_force(ours, theirs)
        wanted = 0.0
        if common:
            precision = common / len(ours)
            recall = common / len(theirs)
            wanted = 2 * precision * recall / (precision + recall)
        assert rouge_l(a, b) == pytest.approx(wanted, abs=1e-12)
    assert rouge_l("the cat sat", "The cat has sat down!") == 0.75


def test_rouge_l_equals_the_package():
    """rouge-score in a process of its own, where it is installed: equal to 1e-6, not stemmed."""
    code = (
        "import json, sys\n"
        "from rouge_score.rouge_scorer import RougeScorer\n"
        "scorer = RougeScorer(['rougeL'], use_stemmer=False)\n"
        "pairs = json.load(sys.stdin)\n"
        "print(json.dumps([scorer.score(b, a)['rougeL'].fmeasure for a, b in pairs]))"
    )
    pairs = texts(200)
    p = subprocess.run(
        [sys.executable, "-P", "-c", code], input=json.dumps(pairs), capture_output=True, text=True
    )
    if "No module named 'rouge_score'" in p.stderr:
        pytest.skip("rouge-score is not installed")
    assert p.returncode == 0, p.stderr
    for (a, b), wanted in zip(pairs, json.loads(p.stdout), strict=True):
        assert abs(rouge_l(a, b) - wanted) < 1e-6


# ----------------------------------------------------------------------------- what is written


def test_plain_template_is_prompt_answer_and_end():
    """Instruction, input, a blank line, Answer:, and the end token that is learned."""
    template = Template(ByteTokenizer(), "auto")
    example = Example("Add.", "1 2", "3")
    assert ByteTokenizer().decode(template.prompt(example)) == "Add.\n\n1 2\n\nAnswer:"
    assert template.answer(example) == [*b" 3", 256]
    assert ByteTokenizer().decode(template.prompt(Example("Add.", "", "3"))) == "Add.\n\nAnswer:"


class Chatting(ByteTokenizer):
    """Bytes, and two special tokens that a template writes around a message."""

    vocab_size = 300
    definition = {
        "added_tokens": [
            {"content": c, "id": i, "special": True} for c, i in (("<s>", 298), ("</s>", 299))
        ]
    }
    chat = ChatFiles("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}<s>", {}, [])

    def encode(self, text: str, special: bool = False) -> list[int]:
        ids = []
        while text:
            found = {"<s>": 298, "</s>": 299}
            mark = next((m for m in found if special and text.startswith(m)), None)
            ids += [found[mark]] if mark else list(text[0].encode())
            text = text[len(mark or text[0]) :]
        return ids


def test_chat_template_is_the_models_own():
    """auto takes the model's template where it has one; the answer ends with what that writes after
    one; plain does not."""
    pytest.importorskip("jinja2")
    example = Example("Add.", "1 2", "3")
    template = Template(Chatting(), "auto")
    assert template.prompt(example) == [298, *b"Add.\n\n1 2", 299, 298]
    assert template.answer(example) == [*b"3", 299] and template.ends[0] == 299
    assert Template(Chatting(), "plain").answer(example)[-1] == 256
    with pytest.raises(ValueError, match="no chat template"):
        Template(ByteTokenizer(), "chat")


@pytest.mark.parametrize(
    "line",
    ['{"instruction": "x"}', '{"output": "x"}', "3", "{", '{"instruction": 1, "output": "x"}'],
)
def test_wrong_lines_are_named(line, tmp_path):
    """What is no example is refused with file and line."""
    path = tmp_path / "f.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' + line)
    with pytest.raises(ValueError, match=r"f\.jsonl, line 2"):
        read_examples(f"instruct:{path}")


# ----------------------------------------------------------------------------- batches


def test_windows_begin_with_an_example_and_learn_answers_alone(tmp_path):
    """Every window begins where an example does; its targets are the next tokens where those belong
    to an answer or end one, and LEFT_OUT elsewhere: read back as text."""
    corpus = instruct_corpus(write(tmp_path), DataConfig(), ByteTokenizer(), 90)
    assert len(corpus.train.starts) > 25 and len(corpus.val.starts) >= 1
    x, y = batch(corpus.train, "train", 3, 5, 9, 90)
    again, _ = batch(corpus.train, "train", 3, 5, 9, 90, rank=1, world=2)
    assert torch.equal(again, x[5:])
    for row, targets in zip(x.tolist(), y.tolist(), strict=True):
        assert bytes(row[:4]) == b"Say "
        assert set(targets[:3]) == {LEFT_OUT}
        for t in range(3, 89):
            before = bytes(i if i < 256 else 10 for i in row[: t + 1])
            last = before[before.rindex(b"Say ") :]
            ended = 256 in row[before.rindex(b"Say ") : t + 1]
            learned = b"Answer:" in last and not ended
            assert targets[t] == (row[t + 1] if learned else LEFT_OUT)


def test_examples_apart_share_no_target():
    """sequential's windows of examples: in order, from an example's start, none in two."""
    starts = np.array([0, 3, 9, 10, 20, 27, 33])
    examples = Examples(np.arange(36), np.ones(36, dtype=bool), starts, {"corpus": "", "split": ""})
    x, y = sequential(examples, 9, 8)
    assert x[:, 0].tolist() == [0, 9, 20]
    assert torch.equal(y, x + 1)
    one = replace(examples, answers=np.arange(36) > 4)
    x, y = sequential(one, 1, 8)  # a window of its own
    assert x[0].tolist() == [*range(8)] and y[0].tolist() == [LEFT_OUT] * 4 + [*range(5, 9)]
    x, _ = sequential(examples, 2, 8)
    assert x[:, 0].tolist() == [0, 20]


def test_answers_loss_is_a_mean_of_sequences():
    """Against a loop; any cut of a batch gives the same; a sequence without targets counts as 0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, 11, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 11, (4, 7), generator=generator)
    y[torch.rand(4, 7, generator=generator) < 0.5] = LEFT_OUT
    y[2] = LEFT_OUT
    by_sequence = []
    for row, targets in zip(logits, y.tolist(), strict=True):
        found = [
            -F.log_softmax(r, -1)[t].item() for r, t in zip(row, targets, strict=True) if t >= 0
        ]
        by_sequence.append(sum(found) / max(1, len(found)))
    assert answers_loss(logits, y).item() == pytest.approx(sum(by_sequence) / 4)
    parts = [
        answers_loss(a, b).item() * len(a) for a, b in ((logits[:3], y[:3]), (logits[3:], y[3:]))
    ]
    assert sum(parts) / 4 == pytest.approx(sum(by_sequence) / 4)
    model = tiny_model()
    x = tokens(4, 7)
    y = tokens(4, 7, seed=1)
    y[:, :3] = LEFT_OUT
    with torch.no_grad():
        assert mean_loss(model, x, y, 3) == pytest.approx(answers_loss(model(x), y).item())


# ----------------------------------------------------------------------------- the task


@torch.no_grad()
@pytest.mark.parametrize("stored", ["dense", "value groups"])
def test_answers_are_generated_through_the_cache(stored, tmp_path):
    """Scores equal those of every prompt alone, read and continued token by token from what is
    kept, up to an end; long prompts are left out; means by task."""
    cfg = replace(TINY, vocab_size=257)
    model = tiny_model(cfg=cfg)
    if stored == "value groups":
        model = grouped_model(cfg=cfg, kv_tail=3, prefill="exact")
    where = write(tmp_path, 13)
    task = instruct(ByteTokenizer(), 37, 99, 0, 3, where, "auto", 9)
    assert task.left_out == 13 - task.n > 0
    ends = {256, 10}
    task = replace(task, ends=list(ends))
    wanted = []
    for prompt, right in zip(task.prompts, task.answers, strict=True):
        cache = model.new_cache(1, 60)
        model.prefill(torch.tensor([prompt[:-1]]), cache)
        ids = [prompt[-1]]
        while len(ids) < 10 and ids[-1] not in ends:
            ids.append(int(model.decode(torch.tensor([ids[-1:]]), cache)[0, -1].argmax()))
        text = ByteTokenizer().decode([i for i in ids[1:] if i not in ends])
        wanted.append(rouge_l(text, right.output))
    assert task.value(model, 4, "float32") == pytest.approx(sum(wanted) / len(wanted))
    by_task = task.also["by_task"]
    assert set(by_task) == {right.task for right in task.answers}


def test_right_answers_score_one(tmp_path, monkeypatch):
    """A model that says what is right, and then its end and more."""
    task = instruct(ByteTokenizer(), 90, 99, 0, 3, write(tmp_path), "auto", 20)
    right = {
        tuple(p): list(a.output.encode()) for p, a in zip(task.prompts, task.answers, strict=True)
    }
    said = lambda model, prompts, room, stop: ([[*right[tuple(p)], 256, 65] for p in prompts], None)
    monkeypatch.setattr("tasks.instruct.generate", said)
    assert task.value(tiny_model(), 7, "float32") == 1


def test_a_run_is_asked_what_its_training_held_out(tmp_path):
    """Of the file that a run was trained on, its path spelled otherwise, every prompt is in the
    held-out tokens and none in those trained on; of another's all are asked."""
    where = write(tmp_path)
    data = DataConfig(val_fraction=0.3)
    corpus = instruct_corpus(where, data, ByteTokenizer(), 90)
    config = {"corpus": f"instruct:{tmp_path}/../{tmp_path.name}/lines.jsonl", "data": vars(data)}
    cfg = EvalConfig(tasks="instruct", dataset=where, sequences=99, answer_tokens=1)
    run = SimpleNamespace(tokenizer=ByteTokenizer(), config=config)
    (task,) = make_tasks(cfg, run, 90, [])

    def inside(prompt: list[int], examples: Examples) -> bool:
        return bytes(prompt) in bytes(i for i in examples.ids.tolist() if i < 256)

    assert task.also["split"] == "val" and task.n == len(corpus.val.starts) > 5
    assert all(inside(p, corpus.val) and not inside(p, corpus.train) for p in task.prompts)
    run.config = {"corpus": f"instruct:{tmp_path}/others.jsonl"}
    (task,) = make_tasks(cfg, run, 90, [])
    assert task.also["split"] == "all" and task.n == 40


# ----------------------------------------------------------------------------- the programs


def test_stages_train_on_instructions_and_eval_scores_them(tmp_path, capsys):
    """adapt and continue on instruct:PATH learn (a lower loss of answers), resume from what they
    left, and eval.py scores the run; texts are refused where instructions are meant and the other
    way round."""
    where = write(tmp_path)
    text = f"text:{tmp_path / 'text.txt'}"
    (tmp_path / "text.txt").write_text("Some words to begin with. " * 900)
    base = pretrain(tmp_path / "base", text, "--pretrain_steps=2", "--block_size=96")
    common = [
        f"--init_from={base}",
        f"--dataset={where}",
        "--adapt_steps=12",
        "--adapt_lr=3e-2",
        "--block_size=96",
    ]
    for name, flags in (
        ("none-s0", ["--stage=continue", "--kv=gqa", "--kv_share=0.5", "--kv_tail=4"]),
        ("lora-s0", ["--stage=adapt", "--adapter=lora", "--kv=dense"]),
    ):
        out = tmp_path / name
        train.run(arguments(*flags, *common, f"--out_dir={out}"))
        stage = next(p for p in out.iterdir() if p.is_dir())
        found = losses(stage)
        assert float(found[-1][1]) < float(found[0][1])
        results = tmp_path / f"r-{name}"
        call(evaluation, f"--out_dir={out}", "--tasks=instruct", f"--dataset={where}", "--sequences=9",
             "--answer_tokens=4", f"--results={results}", "--query=3", "--block_size=96")  # fmt: skip
        (row,) = json.loads((results / "results.json").read_text())
        assert (row["task"], row["metric"], row["split"]) == ("instruct", "ROUGE-L", "val")
        assert 0 < row["n"] < 9
        assert set(row) >= {"by_task", "left_out"} and 0 <= row["value"] <= 1
    for asked, why in (
        (dict(dataset=where), "the task instruct, alone"),
        (dict(tasks="instruct", dataset="pycode"), "the task instruct, alone"),
        (dict(tasks="instruct,needle", dataset=where), "the task instruct, alone"),
        (dict(tasks="zero_shot"), "zero_shot without items"),
        (dict(dataset=f"{where},pycode"), "instructions are not mixed"),
    ):
        with pytest.raises(ValueError, match=why):
            EvalConfig(**asked)
    with pytest.raises(ValueError, match="single stages train on instructions"):
        prepare(where, DataConfig(), ByteTokenizer())


def test_mixsga_rows_answer_instructions(tmp_path):
    """The table trained on instructions: perplexity of the answers, and ROUGE-L of what every row
    generates, to another file than is trained on."""
    where = write(tmp_path)
    others = tmp_path / "others"
    others.mkdir()
    text = f"text:{tmp_path / 'text.txt'}"
    (tmp_path / "text.txt").write_text("Some words to begin with. " * 900)
    base = pretrain(tmp_path / "base", text, "--pretrain_steps=2", "--block_size=96")
    results = tmp_path / "r"
    common = [f"--out_dir={base}", "--tasks=mixsga", f"--dataset={where}", "--mixes=1-2@1:3"]
    with pytest.raises(ValueError, match="its answers are trained on"):
        call(evaluation, *common, f"--answered={others}/../lines.jsonl")
    call(
        evaluation,
        *common,
        f"--answered={write(others, 40, 100).removeprefix('instruct:')}",
        "--answer_tokens=4",
        "--steps=2",
        "--h2o=",
        f"--results={results}",
        "--sequences=2",
        "--kv_tail=4",
    )
    rows = json.loads((results / "results.json").read_text())
    names = [r["name"] for r in rows]
    assert names[0] == "dense" and len(names) == 7 and not any("no tail" in name for name in names)
    for r in rows:
        assert r["answers"] == 40 and 0 <= r["rouge_l"] <= 1 and r["by_task"]
