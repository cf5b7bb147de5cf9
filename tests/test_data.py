"""Claims of data.py: mixtures of corpora, and batches that are a pure function of seed, split, step
and rank."""

import hashlib

import numpy as np
import pytest
import torch
from helpers import Numbers, error_line

import data
from loaders import token_files, tokenizer
from settings.train import SELECT_MIXTURE, STAGES, DataConfig, TrainConfig

# -- mixtures


def write_parts(folder) -> dict[str, list[str]]:
    """Three folders of documents of many sizes, some of them in two folders, by text:PATH."""
    parts = {}
    for k, name in enumerate("abc"):
        docs = [f"{name} {i} " + "x" * (37 * i * (k + 2) % 211) for i in range(31 - 7 * k)]
        docs += [f"in two {i} " + "y" * (29 * i % 101) for i in range(3 * k, 3 * k + 9)]
        (folder / name).mkdir()
        for i, text in enumerate(docs):
            (folder / name / f"{i:03d}.txt").write_text(text)
        parts[f"text:{folder / name}"] = docs
    return parts


def union_rule(parts: dict[str, list[str]], most: int, fraction: float) -> dict[str, list[str]]:
    """The documents of a mixture by loops over all of them: what is held out alone is never trained
    on, each part adds what still fits, in the order of hashes."""

    def digest(doc: str) -> str:
        return hashlib.sha256(doc.encode()).hexdigest()

    alone = {name: data.split_documents(docs, fraction) for name, docs in parts.items()}
    mixture = {}
    for split in ("train", "val", "all"):
        chosen = []
        for name, docs in parts.items():
            left = most * fraction if split == "val" else most
            for doc in sorted(docs, key=digest):
                held = any(doc in val for _, val in alone.values())
                in_split = {"train": not held, "val": doc in alone[name][1], "all": True}[split]
                if in_split and len(doc) <= left:
                    chosen.append(doc)
                    left -= len(doc)
        mixture[split] = sorted(set(chosen), key=digest)
    return mixture


def test_mixture_equals_the_union_rule(tmp_path, monkeypatch):
    """Documents of each split by brute force, whatever the order of the names; no document is in
    train and held out by any part, though some are in two folders; the limit leaves some out; the
    token file has these documents, and its header no folder."""
    parts = write_parts(tmp_path)
    monkeypatch.setattr(data, "MIXTURE_BYTES", 1501)
    cfg = DataConfig(val_fraction=0.3, data_dir=str(tmp_path / "cache"))
    want = union_rule(parts, 1501, 0.3)
    got = data.documents(",".join(parts), cfg)
    assert got == want == data.documents(",".join(reversed(parts)), cfg)
    held = [doc for docs in parts.values() for doc in data.split_documents(docs, 0.3)[1]]
    trained = [doc for docs in parts.values() for doc in data.split_documents(docs, 0.3)[0]]
    assert set(held) & set(trained) and not set(held) & set(got["train"])
    assert set(got["all"]) < {doc for docs in parts.values() for doc in docs}
    made = data.prepare(", ".join(parts), cfg, tokenizer.ByteTokenizer())
    assert bytes(made.val.ids[made.val.ids < 256].astype("uint8")).decode() == "".join(want["val"])
    assert int((made.train.ids == 256).sum()) == len(want["train"])
    assert made.train.header["corpus"] == "text:a,text:b,text:c"
    one = next(iter(parts))
    assert data.documents(one, cfg)["all"] == parts[one]  # alone a corpus has no limit


def test_mixture_of_which_a_part_cannot_add_anything_is_refused(tmp_path, monkeypatch):
    """A part whose shortest document is longer than the limit is named with its split; a list that
    names one twice, or an unknown one, is refused before anything is read."""
    parts = ",".join(write_parts(tmp_path))
    monkeypatch.setattr(data, "MIXTURE_BYTES", 3)
    line = error_line(data.documents, parts, DataConfig())
    assert f"train of text:{tmp_path}/a in a mixture" in line and "3 bytes" in line
    for names, says in (("pydocs,pydocs", "named twice"), ("pydocs,imagenet", "'imagenet'")):
        assert says in error_line(data.documents, names, DataConfig())


def test_wikitext_in_a_mixture_trains_on_its_training_file(monkeypatch):
    """Of WikiText all means its training files, and what its validation and test files hold is
    trained on under no other name."""
    docs = {"train": ["one", "two"], "val": ["three"], "test": ["four"]}
    monkeypatch.setattr(
        data, "_wikitext", lambda corpus, cfg: docs | {"all": ["one", "two", "three", "four"]}
    )
    monkeypatch.setitem(data.MADE_HERE, "pydocs", lambda: ["two", "three", "four", "five", "six"])
    mixture = data.documents("wikitext2,pydocs", DataConfig())
    alone = data.split_documents(["two", "three", "four", "five", "six"], 0.1)
    assert set(mixture["all"]) == {"one", "two", "three", "four", "five", "six"}
    assert set(mixture["val"]) == {"three", *alone[1]}
    assert set(mixture["train"]) == {"one", "two", *alone[0]} - {"three", "four", *alone[1]}
    only = data.documents("wikitext2,markup", DataConfig())
    assert {"one", "two"} < set(only["all"]) and not {"three", "four"} & set(only["all"])


def test_only_selection_trains_on_a_mixture_unless_told():
    """The usual corpora of every stage: predictors are trained on a mixture of kinds, without those
    kept for measuring; all other stages read what they always read."""
    usual = {s: TrainConfig(stage=s).corpus("adapt") for s in STAGES}
    others = dict.fromkeys(("all", "pretrain", "adapt", "continue"), "pycode")
    assert usual == others | {"select": SELECT_MIXTURE}
    assert TrainConfig().corpus("pretrain") == "pydocs"
    assert TrainConfig(stage="select", dataset="pydocs,pycode").corpus("adapt") == "pydocs,pycode"
    assert not {"cheaders", "records"} & set(SELECT_MIXTURE.split(","))


def test_same_text_looks_at_every_part(tmp_path):
    """Two lists share text where any two parts do: the same name, a path spelled otherwise, a file
    in the other's folder, both WikiText; and instructions where they are one file."""
    a = f"text:{tmp_path / 'a'}"
    assert data.same_text(f"pydocs,{a}", f"markup, text:{tmp_path}/b/../a")
    assert data.same_text(f"{a}/one.txt,pycode", a) and data.same_text(a, f"pycode,{a}/one.txt")
    assert data.same_text("wikitext2,pydocs", "markup,wikitext103")
    assert not data.same_text(f"pydocs,{a}", f"markup,pycode,text:{tmp_path}/ab")
    assert data.same_text("instruct:a", "instruct:./a")
    assert not data.same_text("instruct:a", "instruct:b")


def test_a_label_has_every_part_without_its_folders():
    """Of a mixture no part is lost, and none keeps the folders that it lies in."""
    mixture = "wikitext2,text:a/b.txt, text:c/d.txt,pydocs"
    assert data.label_of(mixture) == "wikitext2,text:b.txt,text:d.txt,pydocs"
    assert data.label_of("instruct:a/b.jsonl") == "instruct:b.jsonl"


# -- batches

IDS = np.arange(1009, dtype=np.uint16)  # each id is its own position


def test_batch_is_pure():
    """Equal calls give equal batches whatever was called between; seed, split and step each change
    them."""

    def get(*key):
        return data.batch(IDS, *key, batch_size=7, block_size=31)

    keys = [("train", s, t) for s in (0, 1) for t in range(5)] + [
        ("val", 0, 0),
        ("train", 12, 3),
        ("train", 1, 23),
    ]
    forward = {k: get(*k) for k in keys}
    np.random.seed(0)
    torch.manual_seed(0)
    for k in reversed(keys):
        x, y = get(*k)
        assert torch.equal(x, forward[k][0]) and torch.equal(y, forward[k][1])
    assert len({tuple(x[:, 0].tolist()) for x, _ in forward.values()}) == len(keys)


def test_batch_is_windows_shifted_by_one():
    """x and y are int64 (b, T), consecutive tokens, y one ahead; starts reach the first and last
    place and no further."""
    firsts = set()
    for step in range(41):
        x, y = data.batch(IDS[:23], "train", 3, step, batch_size=13, block_size=19)
        assert (
            x.shape == y.shape == (13, 19)
            and x.dtype == y.dtype == torch.int64
            and x.is_contiguous()
            and y.is_contiguous()
        )
        assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(19))
        firsts |= set(x[:, 0].tolist())
    assert firsts == {0, 1, 2, 3}


def test_batch_stream_is_pinned():
    """The starts are those of this version on every machine: a resumed run sees the batches the
    unbroken one would."""
    assert data.batch(IDS, "train", 1337, 5, 5, 11)[0][:, 0].tolist() == [94, 580, 835, 339, 728]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 11])
def test_batch_ranks_make_up_the_global_batch(world):
    """Slices of all ranks concatenate to the one-rank batch, sizes differ by one at most, and empty
    ones keep their shape."""
    x, y = data.batch(IDS, "train", 1, 2, batch_size=7, block_size=13)
    parts = [data.batch(IDS, "train", 1, 2, 7, 13, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([p[0] for p in parts]), x) and torch.equal(
        torch.cat([p[1] for p in parts]), y
    )
    assert [len(p[0]) for p in parts] == [len(a) for a in np.array_split(np.arange(7), world)]
    assert all(p[0].shape[1] == 13 and p[0].dtype == torch.int64 for p in parts)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 500])
@pytest.mark.parametrize("length", [12, 13, 23, 24, 1009])
def test_sequential_windows_do_not_overlap(n, length):
    """Deterministic, evenly spaced, no target counted twice, as many as asked or fit, from the
    first token to the last."""
    x, y = data.sequential(IDS[:length], n, 11)
    assert (
        len(x) == min(n, (length - 1) // 11) >= 1
        and torch.equal(y, x + 1)
        and x.dtype == torch.int64
    )
    assert (
        len(set(y.flatten().tolist())) == y.numel()
        and x[0, 0] == 0
        and (len(x) == 1 or y[-1, -1] == length - 1)
    )
    gaps = (x[1:, 0] - x[:-1, 0]).tolist()
    assert not gaps or (min(gaps) >= 11 and max(gaps) - min(gaps) <= 1)
    assert torch.equal(x, data.sequential(IDS[:length], n, 11)[0])


def test_short_corpus_is_refused_before_training(tmp_path):
    """block_size tokens are one too few: count, context and remedy are named; one more token is
    enough."""
    f = token_files.open_tokens(
        token_files.write_tokens(tmp_path / "x", range(1, 18), Numbers(256), "text:x", "val"),
        Numbers(256),
    )
    for call in (
        lambda: data.check_length(f, 17),
        lambda: data.batch(f, "val", 0, 0, 3, 17),
        lambda: data.sequential(f, 3, 17),
    ):
        line = error_line(call)
        assert (
            "17 tokens" in line
            and "block_size=17" in line
            and "text:x" in line
            and "--block_size" in line
        )
    data.check_length(f, 16)
    assert (
        data.batch(f, "val", 0, 0, 3, 16)[1][:, -1].tolist() == [17] * 3
        and len(data.sequential(f, 3, 16)[0]) == 1
    )


def test_batch_bad_numbers_are_refused():
    """A batch, window count, rank or context outside its range is one line."""
    for call in (
        lambda: data.batch(IDS, "train", 0, 0, 0, 5),
        lambda: data.batch(IDS, "train", 0, 0, 3, 5, 2, 2),
        lambda: data.batch(IDS, "train", 0, 0, 3, 5, -1, 2),
        lambda: data.sequential(IDS, 0, 5),
        lambda: data.check_length(IDS, 0),
    ):
        error_line(call)
