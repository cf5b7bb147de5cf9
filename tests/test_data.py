"""Claims of data.py: whole documents in one split, checked files, safe downloads, pure batches. No
network but loopback.

    PYTHONPATH=. python -m pytest tests/test_data.py
"""

import contextlib
import hashlib
import itertools
import json
import random
import socket
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from helpers import error_line, tiny_encoding
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from corpora import grammar, shipped
from loaders import fetch, token_files, tokenizer
from settings.train import SELECT_MIXTURE, STAGES, DataConfig, TrainConfig

GOOD = random.Random(3).randbytes(70001)  # more than one block of the reader
GOOD_SHA = hashlib.sha256(GOOD).hexdigest()


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to connect fails at once, and is counted."""
    tries = []

    def refuse(self, address):
        tries.append(address)
        raise OSError("network blocked by the test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tries


@pytest.fixture
def server(monkeypatch):
    """A loopback server with one page per way a download goes wrong; .hits lists the paths asked
    for."""
    release = threading.Event()
    hits = []

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            if self.path == "/missing":
                return self.send_error(404)
            body = {"/wrong": GOOD[:-1] + b"?", "/silent_cut": GOOD[:-77]}.get(
                self.path, extra.get(self.path, GOOD)
            )
            self.send_response(200)
            if self.path != "/silent_cut":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body[:333] if self.path in ("/cut", "/stall") else body)
                self.wfile.flush()
                if self.path == "/stall":
                    release.wait(20)

        def log_message(self, *args):
            pass

    extra = {}
    http = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    http.hits = hits
    http.extra = extra
    http.root = f"http://127.0.0.1:{http.server_address[1]}"
    yield http
    release.set()
    http.shutdown()
    http.server_close()


# -- downloads


def test_download_good_is_fetched_once(server, tmp_path):
    """The bytes arrive whole, leave no other file behind, and a second call asks the server
    nothing."""
    path = tmp_path / "deep" / "file.bin"
    for _ in range(2):
        assert fetch.download(server.root + "/good", GOOD_SHA, path, timeout=5) == path
    assert path.read_bytes() == GOOD and server.hits == ["/good"]
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize(
    "page, says",
    [
        ("/cut", "333 of 70001 bytes"),
        ("/silent_cut", "sha256"),
        ("/wrong", "sha256"),
        ("/missing", "404"),
        ("/stall", "timed out"),
    ],
)
def test_download_failure_names_everything_and_leaves_nothing(server, tmp_path, page, says):
    """Truncation, wrong bytes, 404 and stall: one line with the reason, URL, hash and path; no file
    appears."""
    path = tmp_path / "file.bin"
    start = time.monotonic()
    line = error_line(fetch.download, server.root + page, GOOD_SHA, path, timeout=0.3)
    assert time.monotonic() - start < 10  # and on a busy machine
    assert says in line and server.root + page in line and GOOD_SHA in line and str(path) in line
    assert list(tmp_path.iterdir()) == []


def test_download_part_exists_only_while_fetching(server, tmp_path):
    """The bytes go to a .part file beside the target, and the target does not exist before they are
    all there."""
    path = tmp_path / "file.bin"
    seen = []
    t = threading.Thread(
        target=lambda: seen.append(
            error_line(fetch.download, server.root + "/stall", GOOD_SHA, path, timeout=0.7)
        )
    )
    t.start()
    names = set()
    while t.is_alive():
        names |= {p.name for p in tmp_path.iterdir()}
        t.join(0.01)
    assert (
        len(names) == 1
        and names.pop().endswith(".part")
        and len(seen) == 1
        and list(tmp_path.iterdir()) == []
    )


def test_download_mirrors_are_tried_in_order(server, tmp_path):
    """A 404 and a wrong file move on to the next URL; those after the good one are not asked; all
    failing are all named."""
    urls = [server.root + p for p in ("/missing", "/wrong", "/good", "/cut")]
    assert fetch.download(urls, GOOD_SHA, tmp_path / "a", timeout=5).read_bytes() == GOOD
    assert server.hits == ["/missing", "/wrong", "/good"]
    line = error_line(fetch.download, urls[:2], GOOD_SHA, tmp_path / "b", timeout=5)
    assert urls[0] in line and urls[1] in line


def test_download_offline_is_one_line(no_network, tmp_path):
    """Without a network the message names URL, hash and path; a file placed by hand is then taken
    as it is."""
    path = tmp_path / "file.bin"
    line = error_line(fetch.download, "http://127.0.0.1:9/x", GOOD_SHA, path, timeout=1)
    assert "http://127.0.0.1:9/x" in line and GOOD_SHA in line and str(path) in line and no_network
    path.write_bytes(GOOD)
    assert fetch.download("http://127.0.0.1:9/x", GOOD_SHA, path) == path


def test_download_wrong_file_is_named_and_kept(no_network, tmp_path):
    """A different file at the target is neither used nor overwritten, and no connection is
    tried."""
    path = tmp_path / "file.bin"
    path.write_bytes(GOOD[1:])
    line = error_line(fetch.download, "http://127.0.0.1:9/x", GOOD_SHA, path)
    assert str(path) in line and GOOD_SHA in line and hashlib.sha256(GOOD[1:]).hexdigest() in line
    assert path.read_bytes() == GOOD[1:] and not no_network


def test_pinned_hashes_are_well_formed():
    """Every pinned corpus has a sha256 of 64 hex digits and only https URLs."""
    for name, (file, sha256, urls) in data.PINNED.items():
        assert (
            len(sha256) == 64
            and int(sha256, 16)
            and file
            and urls
            and all(u.startswith("https://") for u in urls)
        ), name


# -- corpora and splits

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


# -- token files


class Numbers:
    """A stand-in tokenizer of any vocabulary size."""

    name = "numbers"
    eot = 0

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


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


# -- mixtures and generated corpora


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
    assert time.process_time() - start < 3
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
