"""Corpora: documents whole and in one split each, text in folders, files and lines of JSON, and
generated ones. No network but loopback."""

import hashlib
import json
import random
import time
import zipfile

import pytest
from helpers import error_line
from hypothesis import given, settings
from hypothesis import strategies as st
from network import no_network, server  # noqa: F401 (fixtures)

import data
from corpora import grammar, shipped
from loaders import tokenizer
from settings.train import DataConfig

WIKI = (
    " \n = First = \n \n text one \n = = Part = = \n more \n = = = Sub = = = \n = = odd = \n"
    " = Second title = \n \n two \n = Third = \n three"
)


def test_split_text_wikitext_headings_cut_documents():
    """Only top-level headings cut; the blank line above the first belongs to the first document."""
    docs = data.split_text(WIKI)
    assert [d.strip().split("\n")[0].strip() for d in docs] == [
        "= First =",
        "= Second title =",
        "= Third =",
    ]
    assert "= = Part = =" in docs[0] and "= = = Sub = = =" in docs[0] and "".join(docs) == WIKI


def test_split_text_blank_lines_make_long_pieces():
    """Pieces are MIN_PIECE characters or more, end after a blank line, and are not needlessly
    long."""
    paragraphs = [
        f"paragraph {i} " + "x" * (i * 37 % 501) + "\n" + "\n" * (1 + i % 3) for i in range(301)
    ]
    docs = data.split_text("".join(paragraphs))
    assert "".join(docs) == "".join(paragraphs) and len(docs) > 5
    assert all(len(d) >= data.MIN_PIECE and d.endswith("\n\n") for d in docs)
    assert all(len(d) < data.MIN_PIECE + 600 for d in docs[:-1])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["\n", " ", "\r\n", " = A = ", " = = B = = ", "a", "\n\n", "é\n"]),
        max_size=41,
    )
)
def test_split_text_loses_nothing(bits):
    """Concatenating the documents gives any text back, and none is empty, for pieces of 5
    characters and up."""
    old = data.MIN_PIECE
    data.MIN_PIECE = 5
    try:
        docs = data.split_text("".join(bits))
    finally:
        data.MIN_PIECE = old
    assert "".join(docs) == "".join(bits) and all(docs)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(max_size=5), min_size=2, max_size=23).filter(lambda d: len(set(d)) > 1),
    st.sampled_from([0.01, 0.1, 0.5, 0.97]),
)
def test_split_documents_never_shares_a_document(docs, fraction):
    """Every document lands in exactly one part, copies together, both parts non-empty, in the
    original order."""
    docs = [d or "-" for d in docs] + ["+"]
    train, val = data.split_documents(docs, fraction)
    assert train and val and not set(train) & set(val)
    assert train == [d for d in docs if d in set(train)] and val == [
        d for d in docs if d in set(val)
    ]
    assert len(train) + len(val) == len(docs)


def test_split_documents_depends_on_content_only():
    """The choice survives reordering, and val has its share of the bytes and no more than one
    document above it."""
    docs = [f"document {i} " * (1 + i * i % 17) for i in range(101)]
    shuffled = random.Random(5).sample(docs, len(docs))
    val = data.split_documents(docs, 0.2)[1]
    again = data.split_documents(shuffled, 0.2)[1]
    assert set(val) == set(again)
    want = 0.2 * sum(map(len, docs))
    have = sum(map(len, val))
    assert want <= have < want + max(map(len, docs))


@pytest.mark.parametrize("docs", [[], ["one"], ["same", "same"]], ids=["none", "one", "copies"])
def test_split_documents_refuses_one_document(docs):
    """One different document cannot be in both parts; the message says what to give."""
    assert "give more files" in error_line(data.split_documents, docs, 0.1)


@pytest.mark.parametrize("corpus", ["pydocs", "pycode"])
def test_embedded_corpora_need_no_network(no_network, tmp_path, corpus):
    """They are found, split and prepared with connect blocked, without a single attempt; both
    splits hold real text."""
    cfg = DataConfig(data_dir=str(tmp_path))
    tok = tokenizer.get_tokenizer("byte")
    if corpus == "pycode":  # its 10 MB are split once here; preparing is proved on pydocs
        parts = data.documents(corpus, cfg)
        assert (
            any("class OrderedDict" in d for d in parts["train"] + parts["val"])
            and sum(map(len, parts["train"])) > 10**6
        )
    else:
        made = data.prepare(corpus, cfg, tok)
        parts = data.documents(corpus, cfg)
        for name, f in (("train", made.train), ("val", made.val)):
            assert (
                len(f) == sum(len(d.encode()) + 1 for d in parts[name])
                and f.header["split"] == name
            )
            assert tok.decode(f.ids) == "".join(parts[name])
    assert not set(parts["train"]) & set(parts["val"]) and not no_network


def test_pycode_leaves_out_what_is_not_the_library(tmp_path, monkeypatch):
    """Packages, tests, demos, generated and undecodable files are left out; the rest comes sorted
    by path."""
    keep = {"b.py": "b", "a/z.py": "z", "a/b/c.py": "c", "a.py": "top"}
    drop = [
        "site-packages/p.py",
        "dist-packages/p.py",
        "test/t.py",
        "a/tests/t.py",
        "idlelib/i.py",
        "lib2to3/l.py",
        "turtledemo/t.py",
        "ensurepip/e.py",
        "config-3.99-x/c.py",
        "pydoc_data/topics.py",
        "a/__pycache__/x.py",
        "_sysconfigdata__x.py",
        "notes.txt",
    ]
    for name, text in {**keep, **dict.fromkeys(drop, "DROP"), "empty.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.setattr(shipped.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [d for d in shipped.pycode() if d] == ["top", "c", "z", "b"]
    parts = data.documents("pycode", DataConfig())
    assert sorted(parts["train"] + parts["val"]) == sorted(keep.values())


def test_text_folder_is_sorted_and_file_is_split(tmp_path):
    """A folder gives one document per file in path order, hidden and empty ones left out; a file's
    bytes survive the splitting."""
    (tmp_path / "sub").mkdir()
    for name, text in {
        "b.txt": "bb",
        "a.txt": "aa",
        "sub/c.txt": "cc",
        ".hidden": "no",
        "empty": "",
    }.items():
        (tmp_path / name).write_text(text)
    assert data._text(str(tmp_path)) == ["aa", "bb", "cc"]
    text = ("line é\r\n" * 701 + "\r\n") * 5
    (tmp_path / "b.txt").write_bytes(text.encode())
    docs = data._text(str(tmp_path / "b.txt"))
    assert len(docs) > 1 and "".join(docs) == text


def test_jsonl_lines_are_documents(tmp_path):
    """Each line's field is a document, whatever the line ends, behind a byte order mark, with blank
    lines; line separators inside a text end no line; a field may be named."""
    rows = [{"text": f"{i}\u2028\n\x85 é", "body": str(i)} for i in range(7)]
    for end in ("\n", "\r\n", "\r", "\n\n"):
        text = end.join(json.dumps(r, ensure_ascii=False) for r in rows) + end
        (tmp_path / "a.JSONL").write_bytes(b"\xef\xbb\xbf" + text.encode())
        for field in ("text", "body"):
            wanted = [r[field] for r in rows]
            cfg = DataConfig(text_field=field)
            assert data.documents(f"text:{tmp_path / 'a.JSONL'}", cfg)["all"] == wanted


@pytest.mark.parametrize(
    "line, says",
    [
        (
            '{"text": 1}',
            "line 2, has 'text': a text in 'text' is needed; name its field by --text_",
        ),
        ('{"body": "b"}', "line 2, has 'body'"),
        ("[1]", "line 2, has no fields"),
        ('{"text": "b"', "line 2: "),
        ("[" * 10**5, "line 2: "),
    ],
)
def test_jsonl_bad_line_is_named(tmp_path, line, says):
    """A line that is no object with such a text is told by its number, in one line."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    name = f"text:{tmp_path / 'a.jsonl'}"
    assert says in error_line(data.documents, name, DataConfig())


def test_text_with_byte_order_mark_is_the_text(tmp_path):
    """A byte order mark is no part of the text; one inside is."""
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b").write_bytes("two\ufeff".encode())
    assert data._text(str(tmp_path)) == ["one", "two\ufeff"]


@pytest.mark.parametrize(
    "unit, end",
    [
        ("some words\r\r", "\r\r"),
        ("some words\r", "\r"),
        ("some words\n", "\n"),
        ("some words ", " "),
        ("字", "字"),
    ],
)
def test_one_long_document_is_cut(unit, end):
    """A long text is cut after blank lines, else after lines, words or characters, whatever the
    line ends; nothing is lost, and no piece is shorter than MIN_PIECE."""
    text = unit * (5 * data.MIN_PIECE // len(unit))
    docs = data.split_text(text)
    assert "".join(docs) == text and 4 <= len(docs) <= 5
    assert all(len(d) >= data.MIN_PIECE and d.endswith(end) for d in docs)


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", "no such file"),
        ("empty", "holds no text"),
        ("folder", "holds no text"),
        ("latin", "UTF-8"),
        ("short", "give more files"),
        ("name", "choose one"),
    ],
)
def test_text_bad_path_is_one_line(tmp_path, kind, says):
    """Missing, empty, undecodable, too short and unknown corpora are told in one line."""
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "short").write_text("one document only")
    name = "texts" if kind == "name" else f"text:{tmp_path / kind}"
    line = error_line(
        data.prepare, name, DataConfig(data_dir=str(tmp_path / "cache")), tokenizer.ByteTokenizer()
    )
    assert says in line and (name.removeprefix("text:") in line or kind == "short")


def test_wikitext_official_files_are_the_splits(server, tmp_path, monkeypatch):
    """train, val and test are the archive's own files, nothing else is written, and ready token
    files need no archive."""
    archive = tmp_path / "made.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for part, file in (("train", "train"), ("val", "valid"), ("test", "test")):
            z.writestr(f"wikitext-2/wiki.{file}.tokens", WIKI.replace("text one", part))
        z.writestr("../escape.txt", "no")
    server.extra["/w.zip"] = archive.read_bytes()
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(data.PINNED, "wikitext2", ("w.zip", sha256, (server.root + "/w.zip",)))
    cfg = DataConfig(data_dir=str(tmp_path / "cache"))
    tok = tokenizer.ByteTokenizer()
    made = data.prepare("wikitext2", cfg, tok)
    parts = data.documents("wikitext2", cfg)
    whole = {s: WIKI.replace("text one", s) for s in ("train", "val", "test")}
    assert {s: "".join(d) for s, d in parts.items()} == whole | {"all": "".join(whole.values())}
    assert tok.decode(made.train.ids) == "".join(parts["train"]) and tok.decode(
        made.val.ids
    ) == "".join(parts["val"])
    assert list(made.val.ids).count(tok.eot) == 3 == len(parts["val"])
    assert not (tmp_path / "escape.txt").exists() and len(list((tmp_path / "cache").iterdir())) == 3
    (test,) = data.prepare_splits("wikitext2", cfg, tok, ["test"])
    assert tok.decode(test.ids) == "".join(parts["test"])
    # though the pin is one
    assert (
        data.prepare("wikitext2", DataConfig(data_dir=cfg.data_dir, detokenize=True), tok).val.path
        != made.val.path
    )
    (tmp_path / "cache" / "w.zip").unlink()
    assert data.prepare("wikitext2", cfg, tok).val.path == made.val.path and server.hits == [
        "/w.zip"
    ]


GENERATED_HASHES = {  # sha256 over the documents, on every machine
    "dialogue": "ece005ebb227731a7856fbb035a6ffc225a8daf6e6b859183546263a68c63637",
    "markup": "ce6a543c3ddf01b0e3c0db70db33d2fe498de5423d4c67e31ac43965a69c84c9",
    "records": "25b4ef2a181726a2786756ea75e7b3b346114867a68c9c65a846c859b1b16a5d",
}


@pytest.mark.parametrize("corpus", GENERATED_HASHES)
def test_generated_corpus_is_the_same_everywhere(no_network, corpus):
    """About a megabyte of different documents, drawn in no time, with a hash that is written down
    here; no template's place is left unfilled but braces that are meant."""
    start = time.process_time()
    docs = data.documents(corpus, DataConfig())["all"]
    assert time.process_time() - start < 10
    whole = "".join(docs)
    assert 1_000_000 <= len(whole.encode()) < 1_020_000 and len(set(docs)) == len(docs) > 400
    assert hashlib.sha256(whole.encode()).hexdigest() == GENERATED_HASHES[corpus]
    assert not grammar.PLACE.search(whole) or corpus == "markup"
    assert not no_network


def test_fill_replaces_places_by_alternatives_and_numbers():
    """Alternatives are filled in turn, numbers keep their range and reach both ends, a string
    stands for itself; several() draws different ones."""
    draw = grammar.Draw("seed")
    rules = {"a": ["{b}!", "{b}?"], "b": "x{3-5}"}
    seen = {grammar.fill(draw, rules, "<{a}>") for _ in range(200)}
    assert seen == {f"<x{n}{end}>" for n in (3, 4, 5) for end in "!?"}
    assert sorted(draw.several("abcde", 5)) == list("abcde")
    with pytest.raises(KeyError):
        grammar.fill(draw, rules, "{c}")


def test_cheaders_are_pythons_own(tmp_path, monkeypatch):
    """Headers of the interface and its two folders, by path; those of packages and the platform's
    own are left out; without any, one line says what to install."""
    monkeypatch.setattr(shipped.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "python3-dev" in error_line(data.documents, "cheaders", DataConfig())
    names = ["z.h", "a.h", "pyconfig.h", "cpython/b.h", "internal/c.h", "package/d.h", "e.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"of {name}")
    got = data.documents("cheaders", DataConfig())["all"]
    assert got == ["of a.h", "of cpython/b.h", "of internal/c.h", "of z.h"]
