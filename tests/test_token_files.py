"""Token files: layout, checks of what is read, and a cache of prepared splits that is never
stale."""

import hashlib
import itertools
import json
import threading

import numpy as np
import pytest
from helpers import Numbers, error_line, tiny_encoding

import data
from loaders import token_files, tokenizer
from settings.train import DataConfig


@pytest.mark.parametrize(
    "vocab, dtype, size",
    [(256, "uint8", 1), (257, "uint16", 2), (65536, "uint16", 2), (65537, "uint32", 4)],
)
def test_token_file_layout(tmp_path, vocab, dtype, size):
    """4096 bytes of magic and JSON, then little-endian ids of the smallest type that holds the
    vocabulary, mapped read-only."""
    ids = np.arange(1, 1004, 7) % vocab
    path = tmp_path / "x.tok"
    ids[5] = vocab - 1
    token_files.write_tokens(path, ids, Numbers(vocab), "a corpus", "train")
    raw = path.read_bytes()
    f = token_files.open_tokens(path, Numbers(vocab))
    assert (
        raw.startswith(b"subtoken tokens 1\n")
        and len(raw) == 4096 + size * len(ids)
        and raw[4095:4096] == b" "
    )
    assert raw[4096:] == b"".join(int(i).to_bytes(size, "little") for i in ids)
    assert (
        json.loads(raw[18:4096])
        == f.header
        == dict(
            dtype=dtype,
            tokenizer="numbers",
            vocab_size=vocab,
            eot=0,
            count=len(ids),
            sha256=hashlib.sha256(raw[4096:]).hexdigest(),
            corpus="a corpus",
            split="train",
        )
    )
    assert (
        isinstance(f.ids, np.memmap)
        and not f.ids.flags.writeable
        and np.array_equal(f.ids, ids)
        and len(f) == len(ids)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["x.tok"]


def test_token_file_in_pieces_equals_whole(tmp_path):
    """An iterator of pieces gives the same bytes as one array; a failing one leaves the old file
    and nothing else."""
    ids = list(range(1, 252))
    tok = Numbers(256)
    token_files.write_tokens(tmp_path / "a", ids, tok)
    token_files.write_tokens(
        tmp_path / "b", iter([ids[:13], np.array(ids[13:14]), [], ids[14:]]), tok
    )
    before = (tmp_path / "a").read_bytes()
    assert before == (tmp_path / "b").read_bytes()
    for bad in (iter([ids, [256]]), [-1], [], iter([])):
        error_line(token_files.write_tokens, tmp_path / "a", bad, tok)
    assert (tmp_path / "a").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_open_tokens_damaged_file_is_named(tmp_path):
    """One flipped byte of the payload, or the file cut or grown anywhere, is refused with its name
    and what to do."""
    path = tmp_path / "x.tok"
    tok = tokenizer.ByteTokenizer()
    token_files.write_tokens(path, [i % 257 for i in range(503)], tok)
    raw = path.read_bytes()
    assert len(token_files.open_tokens(path, tok)) == 503
    damaged = [raw[:n] for n in (0, 7, 18, 99, 4095, 4096, 4097, len(raw) - 1)] + [raw + b"\0"]
    for at in (0, 3, 19, 30, 4096, 4097, 4600, len(raw) - 1):
        damaged.append(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    for changed in damaged:
        path.write_bytes(changed)
        line = error_line(token_files.open_tokens, path, tok)
        assert str(path) in line and "delete it, it is built again" in line
    path.unlink()
    assert str(path) in error_line(token_files.open_tokens, path, tok)


@pytest.mark.parametrize(
    "change",
    [
        dict(dtype="float8"),
        dict(dtype="uint32"),
        dict(dtype=7),
        dict(count=502),
        dict(count=0),
        dict(count=-1),
        dict(count="503"),
        dict(count=True),
        dict(tokenizer="gpt2"),
        dict(vocab_size=256),
        dict(eot=3),
        dict(sha256="0" * 64),
        dict(more=1),
    ],
    ids=str,
)
def test_open_tokens_header_is_checked(tmp_path, change):
    """Every field that decides how the payload is read is checked against file and tokenizer; the
    file is named."""
    path = tmp_path / "x.tok"
    tok = tokenizer.ByteTokenizer()
    token_files.write_tokens(path, [i % 257 for i in range(503)], tok)
    raw = path.read_bytes()
    header = json.loads(raw[18:4096]) | change
    path.write_bytes((raw[:18] + json.dumps(header).encode()).ljust(4096) + raw[4096:])
    line = error_line(token_files.open_tokens, path, tok)
    assert str(path) in line and "delete it" in line


def test_open_tokens_id_too_large_is_refused(tmp_path):
    """An id outside the vocabulary is found even where hash and header agree with the payload."""
    path = tmp_path / "x.tok"
    tok = tokenizer.ByteTokenizer()
    token_files.write_tokens(path, [5, 299, 7], Numbers(301))
    raw = path.read_bytes()
    header = json.loads(raw[18:4096]) | dict(tokenizer="byte", vocab_size=257, eot=256)
    path.write_bytes((raw[:18] + json.dumps(header).encode()).ljust(4096) + raw[4096:])
    line = error_line(token_files.open_tokens, path, tok)
    assert "299" in line and "0..256" in line and str(path) in line


def test_open_tokens_wrong_tokenizer_is_refused(tmp_path):
    """A file of another tokenizer, or of another vocabulary of the same name, is refused and both
    are named."""
    path = token_files.write_tokens(tmp_path / "x.tok", [1, 2, 3], Numbers(256))
    line = error_line(token_files.open_tokens, path, tokenizer.ByteTokenizer())
    assert "numbers" in line and "byte" in line
    assert "255" in error_line(token_files.open_tokens, path, Numbers(255))


def text_corpus(folder, n=9):
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.txt").write_text(f"hello {i} " * (20 + i))
    return f"text:{folder}"


def test_prepare_is_cached_and_never_stale(tmp_path):
    """The same corpus is not built twice; another text, tokenizer, pattern or val_fraction gets
    files of its own."""
    corpus = text_corpus(tmp_path / "t")
    cfg = DataConfig(data_dir=str(tmp_path / "cache"))
    tok = tokenizer.ByteTokenizer()
    first = data.prepare(corpus, cfg, tok)
    stamp = first.train.path.stat().st_mtime_ns, first.train.path.stat().st_ino
    again = data.prepare(corpus, cfg, tok)
    assert (
        again.train.path.stat().st_mtime_ns,
        again.train.path.stat().st_ino,
    ) == stamp and again.train.path == first.train.path
    seen = {first.train.path}
    for c, t in (
        (cfg, tokenizer.TiktokenTokenizer(tiny_encoding())),
        (cfg, tokenizer.TiktokenTokenizer(tiny_encoding(pattern=r"\w|\W"))),
        (DataConfig(data_dir=cfg.data_dir, val_fraction=0.5), tok),
    ):
        seen.add(data.prepare(corpus, c, t).train.path)
    (tmp_path / "t" / "3.txt").write_text("changed " * 31)
    changed = data.prepare(corpus, cfg, tok)
    seen.add(changed.train.path)
    assert len(seen) == 5 and "changed" in tok.decode(changed.train.ids) + tok.decode(
        changed.val.ids
    )
    assert all(f.ids[-1] == tok.eot for f in (changed.train, changed.val))
    assert sum(int((f.ids == tok.eot).sum()) for f in (changed.train, changed.val)) == 9


def test_detokenize_undoes_wikitext_spacing():
    """Hyphens and marks inside numbers lose their '@', punctuation joins the word before it,
    brackets close, unknown words are X; text without such spacing stays as it is, and doing it
    twice changes nothing more."""
    pairs = {
        "a well @-@ known 1 @,@ 234 @.@ 5": "a well-known 1,234.5",
        "one , two ; three : four .": "one, two; three: four.",
        "( in brackets )": "(in brackets)",
        "Valkyria 's": "Valkyria's",
        "the <unk> of <unk>": "the X of X",
        'he said " yes "': 'he said" yes"',
        " = Title = \n": " = Title = \n",
        "def f(x): return x - 1": "def f(x): return x - 1",
        "a 's' b": "a's' b",
        "": "",
    }
    for before, after in pairs.items():
        assert data.detokenize(before) == after == data.detokenize(after)


def test_prepare_splits_all_and_what_a_corpus_lacks(tmp_path):
    """`all` is every document once, in the corpus's order; a text has no `test`, which is said in
    one line and leaves no file."""
    corpus = text_corpus(tmp_path / "t")
    cfg = DataConfig(data_dir=str(tmp_path / "cache"))
    tok = tokenizer.ByteTokenizer()
    line = error_line(data.prepare_splits, corpus, cfg, tok, ["test"])
    assert (
        "split='test'" in line
        and "it has train, val, all" in line
        and not (tmp_path / "cache").exists()
    )
    everything, val = data.prepare_splits(corpus, cfg, tok, ["all", "val"])
    assert tok.decode(everything.ids) == "".join(
        (tmp_path / "t" / f"{i}.txt").read_text() for i in range(9)
    )
    assert (everything.header["split"], val.header["split"]) == ("all", "val") and int(
        (everything.ids == tok.eot).sum()
    ) == 9
    made = data.prepare(corpus, cfg, tok)
    assert val.path == made.val.path and len(made.train) + len(made.val) == len(everything)


def test_bos_begins_every_document_and_detokenize_its_own_file(tmp_path):
    """A tokenizer with a bos puts it before every document, and the end token after it; bos and
    --detokenize each name another file, and --detokenize changes the text that becomes tokens, not
    which document is held out."""
    (tmp_path / "t").mkdir()
    for i in range(9):
        (tmp_path / "t" / f"{i}.txt").write_text(f"hello {i} , " * (20 + i))
    corpus = f"text:{tmp_path / 't'}"
    tok = tokenizer.TiktokenTokenizer(tiny_encoding())
    with_bos = tokenizer.TiktokenTokenizer(tiny_encoding(), bos=104)
    cfg = DataConfig(data_dir=str(tmp_path / "cache"))
    plain = data.prepare(corpus, cfg, tok)
    begun = data.prepare(corpus, cfg, with_bos)
    typed = data.prepare(corpus, DataConfig(data_dir=cfg.data_dir, detokenize=True), tok)
    assert len({f.path for c in (plain, begun, typed) for f in (c.train, c.val)}) == 6

    def documents(ids):
        cuts = [-1, *np.flatnonzero(ids == tok.eot)]
        return [ids[a + 1 : b].tolist() for a, b in itertools.pairwise(cuts)]

    for split in ("train", "val"):
        bare, longer, short = (documents(getattr(c, split).ids) for c in (plain, begun, typed))
        assert longer == [[104, *d] for d in bare] and len(short) == len(bare) > 0
        assert [tok.decode(d) for d in short] == [tok.decode(d).replace(" ,", ",") for d in bare]


def test_detokenize_leaves_code_as_it_is():
    """Only WikiText's files and text of one's own are WikiText's kind: Python's source keeps the
    spaces that detokenize would take."""
    splits = {flag: data.documents("pycode", DataConfig(detokenize=flag)) for flag in (False, True)}
    assert splits[True] == splits[False]
    assert any(data.detokenize(d) != d for d in splits[False]["val"])


def test_prepare_val_fraction_is_part_of_the_name(tmp_path):
    """Where train comes before val in the folder, any cut leaves the same documents in the same
    order: still another file."""
    texts = sorted(
        (f"text {i}" for i in range(9)),
        key=lambda t: hashlib.sha256(t.encode()).digest(),
        reverse=True,
    )
    for i, t in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(t)
    for fraction, n in ((0.1, 1), (0.5, 5)):
        made = data.prepare(
            f"text:{tmp_path}",
            DataConfig(data_dir=str(tmp_path / ".cache"), val_fraction=fraction),
            tokenizer.ByteTokenizer(),
        )
        assert int((made.val.ids == 256).sum()) == n and int((made.train.ids == 256).sum()) == 9 - n


def test_prepare_damaged_cache_is_named_then_rebuilt(tmp_path):
    """A damaged cached file stops the run with its name; deleted, it is built again with the same
    bytes."""
    corpus = text_corpus(tmp_path / "t")
    cfg = DataConfig(data_dir=str(tmp_path / "cache"))
    tok = tokenizer.ByteTokenizer()
    path = data.prepare(corpus, cfg, tok).val.path
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-2] ^ 2]))
    assert str(path) in error_line(data.prepare, corpus, cfg, tok)
    path.unlink()
    assert data.prepare(corpus, cfg, tok).val.path.read_bytes() == raw


def test_prepare_at_the_same_time_is_safe(tmp_path):
    """Eight simultaneous preparations all see whole files, equal ones, and leave no temporary
    file."""
    corpus = text_corpus(tmp_path / "t", 23)
    cfg = DataConfig(data_dir=str(tmp_path / "cache"))
    tok = tokenizer.ByteTokenizer()
    start = threading.Barrier(8)
    out = []

    def work():
        start.wait()
        out.append(hashlib.sha256(data.prepare(corpus, cfg, tok).train.ids).hexdigest())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(out) == 8 and len(set(out)) == 1 and len(list((tmp_path / "cache").iterdir())) == 2


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    """data_dir wins, then $XDG_CACHE_HOME, then ~/.cache; a folder that cannot be written is one
    line."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_dir(DataConfig(data_dir=str(tmp_path))) == tmp_path
    assert data.cache_dir(DataConfig()) == tmp_path / "xdg" / "subtoken"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir(DataConfig()) == tmp_path / "home" / ".cache" / "subtoken"
    (tmp_path / "file").touch()
    cfg = DataConfig(data_dir=str(tmp_path / "file" / "under"))
    assert "--data_dir" in error_line(
        data.prepare, text_corpus(tmp_path / "t"), cfg, tokenizer.ByteTokenizer()
    )
