"""Text in, batches of token ids out.

A corpus is a list of documents (str). Three are the same on every machine with the same Python:
`pydocs` (the language reference inside CPython), `pycode` (the standard library's source) and
`cheaders` (the headers of its C interface). Three are generated, the same everywhere: `dialogue`,
`markup` and `records`. None of those (corpora/) needs a network. `shakespeare`, `wikitext2`,
`wikitext103` are downloaded once, against a pinned sha256; `text:PATH` is a file or a folder of
text files, or of JSONL. `instruct:PATH` are instructions with answers (loaders/instructions.py).

Documents are divided into train and val whole, by the hash of their content (WikiText keeps its
official files), so no document is ever in both. Several corpora, separated by commas, are one
mixture (mixed_documents), in which no corpus has more than MIXTURE_BYTES. Each split becomes one
token file (loaders/token_files.py), every document followed by the end-of-document token. Its name
carries a hash of all that defines its content, so a changed text, rule or tokenizer is never served
stale tokens.

A batch is a pure function of (seed, split, step): it needs no state to resume and means the same
for any number of ranks.

    from settings.train import DataConfig
    from loaders.tokenizer import get_tokenizer
    print(len(data.prepare("pydocs", DataConfig(), get_tokenizer("byte")).train))
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import check, comma_list
from corpora import dialogue, markup, records, shipped
from loaders.examples import LEFT_OUT, Examples
from loaders.fetch import download
from loaders.token_files import TokenFile, open_tokens, write_tokens
from loaders.tokenizer import encoded
from settings.files import texts_of, visible_files
from settings.places import TEXT, check_text
from settings.train import DataConfig, check_corpora, check_corpus

# name: (file, sha256, URLs tried in order)
PINNED = {
    "shakespeare": (
        "tinyshakespeare.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        (
            "https://raw.githubusercontent.com/karpathy/char-rnn/master"
            "/data/tinyshakespeare/input.txt",
        ),
    ),
    "wikitext2": (
        "wikitext-2-v1.zip",
        "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
        (
            "https://wikitext.smerity.com/wikitext-2-v1.zip",
            "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip",
        ),
    ),
    "wikitext103": (
        "wikitext-103-v1.zip",
        "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        (
            "https://wikitext.smerity.com/wikitext-103-v1.zip",
            "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
        ),
    ),
}
WIKITEXT_FILES = {
    "train": "wiki.train.tokens",
    "val": "wiki.valid.tokens",
    "test": "wiki.test.tokens",
}
WIKITEXT_FOLDERS = {"wikitext2": "wikitext-2", "wikitext103": "wikitext-103"}
MIN_PIECE = 8192  # characters in a piece of a text that has no headings
# The most that one corpus adds to a mixture, in bytes of UTF-8: as much as all of WikiText-2's
# validation text.
MIXTURE_BYTES = 1_125_000
MADE_HERE = {
    "pydocs": shipped.pydocs,
    "pycode": shipped.pycode,
    "cheaders": shipped.cheaders,
    "dialogue": dialogue.documents,
    "markup": markup.documents,
    "records": records.documents,
}
# Part of every token file's name: raise it when the way text becomes documents or splits changes.
RULES = 1


# -- corpora: lists of documents


def _text(where: str, text_field: str = "text") -> list[str]:
    """A file, cut into documents, or the files of a folder, hidden ones left out; of JSONL the
    text_field of each line is a document."""
    check_text(f"text:{where}")
    files = visible_files(Path(where).expanduser())
    docs = [d for path in files for d in texts_of(path, text_field) if d]
    check(bool(docs), f"text:{where}", "it holds no text", TEXT)
    return split_text(docs[0]) if len(docs) == 1 else docs


def _pinned(corpus: str, cfg: DataConfig) -> list[str]:
    """A corpus of one text that is downloaded."""
    name, sha256, urls = PINNED[corpus]
    path = download(urls, sha256, cache_dir(cfg) / name)
    return split_text(path.read_bytes().decode("utf-8"))


def _wikitext(corpus: str, cfg: DataConfig) -> dict[str, list[str]]:
    """Documents of WikiText's official files, by split. The archive is read in place: nothing that
    it names is ever written."""
    name, sha256, urls = PINNED[corpus]
    path = download(urls, sha256, cache_dir(cfg) / name)
    splits = {}
    with zipfile.ZipFile(path) as z:
        for split, file in WIKITEXT_FILES.items():
            splits[split] = split_text(z.read(f"{WIKITEXT_FOLDERS[corpus]}/{file}").decode("utf-8"))
    splits["all"] = [d for docs in splits.values() for d in docs]
    return splits


def split_text(text: str) -> list[str]:
    """Documents of one text, in order; concatenated they give the text back. Cut before each
    top-level WikiText heading (` = Title = `) if there are two or more, what stands above the first
    belonging to the first document; else into pieces of at least MIN_PIECE characters (a shorter
    rest joins the piece before it): after blank lines, or where that gives one piece, after lines,
    then after words, then anywhere."""
    heads = [m.start() for m in re.finditer(r"^ = (?!=)[^\n]*(?<!=) = *\r?$", text, re.MULTILINE)]
    if len(heads) >= 2:
        bounds = [0, *heads[1:]]
    else:
        end = "\n" if "\n" in text else "\r"
        for mark in (rf"{end}\s*{end}", end, r"\s", r"(?s:.)"):
            bounds = _piece_starts(text, mark)
            if len(bounds) > 1:
                break
    bounds.append(len(text))
    return [text[a:b] for a, b in itertools.pairwise(bounds) if a < b]


def _piece_starts(text: str, mark: str) -> list[int]:
    """Where pieces of at least MIN_PIECE characters start, 0 and after marks (a pattern)."""
    starts = [0]
    for m in re.finditer(mark, text):
        if m.end() - starts[-1] >= MIN_PIECE and len(text) - m.end() >= MIN_PIECE:
            starts.append(m.end())
    return starts


DETOKENIZE = [
    (re.compile(a), b)
    for a, b in (
        (r" @([-,.])@ ", r"\1"),
        (r" ([,.;:)])", r"\1"),
        (r" ('s)\b", r"\1"),
        (r"\( ", "("),
        (' "', '"'),
        ("<unk>", "X"),
    )
]


def detokenize(text: str) -> str:
    """WikiText as it would be typed: ' @-@ ' is a hyphen, punctuation stands at the word before it,
    an unknown word is X. A pretrained model has seen text, not tokens. (Every space before a double
    quote goes, opening or closing: the marks do not say which it is.)"""
    for pattern, by in DETOKENIZE:
        text = pattern.sub(by, text)
    return text


def split_documents(docs: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """(train, val), each in the documents' own order. In order of the sha256 of their content
    documents go to val until it has val_fraction (0 < . < 1) of the UTF-8 bytes; each part gets at
    least one, and copies of one document stay together. ValueError if there are fewer than two
    different documents."""
    digests = [_digest(d) for d in docs]
    size: dict[bytes, int] = {}
    for d, h in zip(docs, digests, strict=True):
        size[h] = size.get(h, 0) + len(d.encode("utf-8"))
    check(
        len(size) >= 2,
        f"a corpus of {len(size)} different document(s)",
        "train and val need at least one each",
        f"give more files, or a text of {2 * MIN_PIECE} characters or more",
    )
    val = set()
    held = 0
    want = val_fraction * sum(size.values())
    for h in sorted(size)[:-1]:  # the last is left for train, whatever val_fraction says
        if held < want:
            val.add(h)
            held += size[h]
    pairs = list(zip(docs, digests, strict=True))
    return [d for d, h in pairs if h not in val], [d for d, h in pairs if h in val]


def whole_split(corpus: str, official: str) -> str:
    """The split that means a corpus as a whole: all of it, or of WikiText the `official` one, since
    its files belong to different uses."""
    return official if corpus in WIKITEXT_FOLDERS else "all"


def same_text(a: str, b: str) -> bool:
    """Whether two corpora or mixtures share text: any part of one and any of the other that have
    the same name or path, lie in one another, or are both WikiText (the small one is part of the
    large)."""
    pairs = itertools.product(comma_list(a), comma_list(b))
    return any(_same_part(one, other) for one, other in pairs)


def _same_part(a: str, b: str) -> bool:
    """Whether two corpora share text."""
    kind = a.partition(":")[0]
    if kind in ("text", "instruct") and b.startswith(f"{kind}:"):
        one, other = (Path(part.partition(":")[2]).expanduser().resolve() for part in (a, b))
        return one.is_relative_to(other) or other.is_relative_to(one)
    return a == b or {a, b} <= set(WIKITEXT_FOLDERS)


def cache_dir(cfg: DataConfig) -> Path:
    """Folder of token files and downloads: cfg.data_dir, or `subtoken` in the user's cache
    folder."""
    if cfg.data_dir:
        return Path(cfg.data_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The standard says that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "subtoken"


def documents(corpus: str, cfg: DataConfig) -> dict[str, list[str]]:
    """Documents of each split, {"train": [...], "val": [...], "all": [...]} (WikiText has "test"
    too), of a corpus or a mixture. Empty documents are dropped. May download. ValueError for an
    unknown, missing, empty or one-document corpus."""
    if len(comma_list(corpus)) > 1:
        return mixed_documents(corpus, cfg)
    check_corpus(corpus)
    if corpus in WIKITEXT_FOLDERS:
        splits = _wikitext(corpus, cfg)
    else:
        docs = [d for d in _documents(corpus, cfg) if d]
        train, val = split_documents(docs, cfg.val_fraction)
        splits = {"train": train, "val": val, "all": docs}
    from_file = corpus in WIKITEXT_FOLDERS or corpus.startswith("text:")
    if not (cfg.detokenize and from_file):  # what others hold is code, or was typed
        return splits
    return {split: [detokenize(d) for d in docs] for split, docs in splits.items()}


def mixed_documents(names: str, cfg: DataConfig) -> dict[str, list[str]]:
    """Documents of each split of a mixture, {"train": [...], "val": [...], "all": [...]}. names:
    corpora, separated by commas.

    Each corpus is split as it is alone, and adds whole documents of at most MIXTURE_BYTES bytes to
    train and to all, and of val_fraction of those to val: in order of the sha256 of their content,
    each that still fits. All is of WikiText its training files. What any of the corpora holds out
    (all of val and test, not only what was taken) is left out of train, so that each may be
    measured alone. A split is in order of the sha256 of content, copies of a document left out:
    the order depends on neither the machine nor the order of the names. ValueError as for
    documents, and for a corpus of which no document fits."""
    check_corpora(names)
    parts = {name: documents(name, cfg) for name in comma_list(names)}
    held = set()
    for splits in parts.values():
        held.update(splits["val"], splits.get("test", []))
    mixture = {}
    for split in ("train", "val", "all"):
        most = MIXTURE_BYTES * (cfg.val_fraction if split == "val" else 1)
        taken = set()
        for name, splits in parts.items():
            docs = set(splits[whole_split(name, "train") if split == "all" else split])
            if split == "train":
                docs -= held
            taken.update(_fitting(docs, most, f"{split} of {name}"))
        mixture[split] = sorted(taken, key=_digest)
    return mixture


def _fitting(docs: set[str], most: float, what: str) -> list[str]:
    """Of documents in order of their digests each that still fits into `most` bytes. ValueError
    where none does; what: the documents' name."""
    taken = []
    for doc in sorted(docs, key=_digest):
        size = len(doc.encode("utf-8"))
        if size <= most:
            taken.append(doc)
            most -= size
    check(
        bool(taken),
        f"{what} in a mixture",
        f"no document of {most:,.0f} bytes or fewer that no other corpus holds out",
        "give files of more and shorter documents, or a larger --val_fraction",
    )
    return taken


def _digest(document: str) -> bytes:
    """The sha256 of a document's UTF-8 bytes."""
    return hashlib.sha256(document.encode("utf-8")).digest()


def _documents(corpus: str, cfg: DataConfig) -> list[str]:
    """The documents of a corpus that has no splits of its own."""
    if corpus.startswith("text:"):
        return _text(corpus[5:], cfg.text_field)
    if corpus in PINNED:
        return _pinned(corpus, cfg)
    return MADE_HERE[corpus]()


# -- token files of a corpus


@dataclass(frozen=True)
class Corpus:
    """The two token files of a corpus."""

    train: TokenFile
    val: TokenFile


def _token_path(
    corpus: str, cfg: DataConfig, tokenizer, content: str, sample: str, split: str
) -> Path:
    """Where the tokens of a split lie, by a hash of all that defines them. content: the text's own
    hash; sample: some of it."""
    # Ids of a probe tell apart tokenizers that share name and size but not their merges or their
    # splitting pattern.
    probe = tokenizer.encode(
        "A probe:\n\tdef naïve(x): return x**2  # = Wiki = @-@ 1,234.5 it's 字 🙂\r\n  END "
        + sample
    )
    parts = [
        RULES,
        corpus,
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.eot,
        tokenizer.bos,
        probe,
        cfg.val_fraction,
        cfg.detokenize,
        content,
    ]
    key = hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()[:16]
    kind = "mixture" if len(comma_list(corpus)) > 1 else corpus.split(":")[0]
    label = re.sub(r"[^A-Za-z0-9.-]", "_", f"{kind}-{tokenizer.name}"[:60])
    return cache_dir(cfg) / f"{label}-{split}-{key}.tok"


def prepare_splits(
    corpus: str, cfg: DataConfig, tokenizer, splits: Sequence[str]
) -> list[TokenFile]:
    """Token files of some splits of a corpus (one of settings.train.CORPORA or text:PATH) or of a
    mixture, one a split, built on first use under cache_dir(cfg), checked on every use. ValueError
    as for documents, write_tokens and open_tokens: in particular a damaged file is named, not
    silently replaced."""
    check_corpora(corpus)
    check(
        not corpus.startswith("instruct:"),
        f"{corpus} where a text is read",
        "single stages train on instructions, and the task instruct measures them",
        "give a text; eval.py is told by --calibrate what a base is calibrated on",
    )
    docs = None
    if corpus in PINNED:
        content = PINNED[corpus][1]  # defines the text: ready files need no download
        sample = ""
    else:
        docs = documents(corpus, cfg)
        content = _content_hash(docs)
        sample = docs["train"][0][:4096]
    label = label_of(corpus)
    files = []
    for split in splits:
        path = _token_path(corpus, cfg, tokenizer, content, sample, split)
        if not path.exists():
            docs = docs or documents(corpus, cfg)
            check(
                split in docs,
                f"split={split!r} of {corpus}",
                f"it has {', '.join(docs)}",
                "choose one of them",
            )
            write_tokens(
                path,
                ([*encoded(tokenizer, d), tokenizer.eot] for d in docs[split]),
                tokenizer,
                label,
                split,
            )
        files.append(open_tokens(path, tokenizer))
    return files


def label_of(corpus: str) -> str:
    """The name of a corpus or mixture without the folders that texts lie in."""
    names = []
    for part in comma_list(corpus):
        kind, _, path = part.partition(":")
        names.append(f"{kind}:{Path(path).name}" if path else part)
    return ",".join(names)


def content_hash(corpus: str, cfg: DataConfig) -> str:
    """The sha256 that stands for the content of a corpus or mixture: of a download its file's, else
    over the sha256 of every document of every split. ValueError as for documents."""
    if corpus in PINNED:
        return PINNED[corpus][1]  # ready token files need no download
    return _content_hash(documents(corpus, cfg))


def _content_hash(docs: dict[str, list[str]]) -> str:
    """sha256 over the sha256 of every document of every split."""
    whole = hashlib.sha256()
    for split in docs:
        for d in docs[split]:
            whole.update(_digest(d))
    return whole.hexdigest()


def prepare(corpus: str, cfg: DataConfig, tokenizer) -> Corpus:
    """The training and validation splits of a corpus: see prepare_splits."""
    return Corpus(*prepare_splits(corpus, cfg, tokenizer, ("train", "val")))


# -- batches


Tokens = TokenFile | Examples | np.ndarray


def check_length(tokens: Tokens, block_size: int) -> None:
    """Raise ValueError unless a window of block_size tokens and the one after them fits."""
    check(
        block_size >= 1,
        f"block_size={block_size}",
        "a context is at least 1 token",
        "give --block_size=1 or more",
    )
    what = ""
    if isinstance(tokens, (TokenFile, Examples)):
        what = f"{tokens.header['corpus']}, {tokens.header['split']}: "
    check(
        len(tokens) >= block_size + 1,
        f"{what}{len(tokens)} tokens with block_size={block_size}",
        f"at least {block_size + 1} are needed",
        "give a smaller --block_size, a longer text, or another --val_fraction",
    )


def _windows(
    tokens: Tokens, starts: np.ndarray, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y), each (b, block_size) int64: tokens from starts (b,) on, y one token ahead of x, and
    of examples LEFT_OUT but where it is an answer's."""
    ids = np.asarray(tokens) if isinstance(tokens, np.ndarray) else tokens.ids
    places = starts[:, None] + np.arange(block_size + 1)  # (b, block_size + 1)
    if isinstance(tokens, Examples):
        places %= len(ids)
    w = torch.from_numpy(ids[places].astype(np.int64))
    x = w[:, :-1].contiguous()
    y = w[:, 1:].contiguous()
    if isinstance(tokens, Examples):
        # a new tensor: of one window, y has its memory in common with x
        y = y.masked_fill(torch.from_numpy(~tokens.answers[places[:, 1:]]), LEFT_OUT)
    return x, y


def batch(
    tokens: Tokens,
    split: str,
    seed: int,
    step: int,
    batch_size: int,
    block_size: int,
    rank: int = 0,
    world: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank `rank`'s share (x, y) of the global batch of `step`: int64 (b, block_size), y one token
    ahead of x. Windows of examples begin where an example does.

    The global batch is batch_size windows at uniform starts that depend on (seed, split, step)
    alone: no state, no call order, no ranks. Rank r of `world` takes a contiguous share; the first
    batch_size % world ranks have one more, and a share may be empty, (0, block_size). ValueError
    for tokens too short for the context, batch_size < 1, or a rank outside 0..world - 1."""
    check_length(tokens, block_size)
    check(
        batch_size >= 1,
        f"batch_size={batch_size}",
        "at least 1 sequence",
        "give a positive batch size",
    )
    check(
        0 <= rank < world,
        f"rank={rank} of {world}",
        "a rank lies in 0..world - 1",
        "start it with torchrun",
    )
    key = hashlib.sha256(f"{seed}/{split}/{step}".encode()).digest()[:16]
    # Raw Philox words: numpy promises that their stream stays the same in every version, which it
    # does not for integers().
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(batch_size)
    if isinstance(tokens, Examples):
        starts = tokens.starts[(raw % np.uint64(len(tokens.starts))).astype(np.int64)]
    else:
        starts = (raw % np.uint64(len(tokens) - block_size)).astype(np.int64)  # (batch_size,)
    each, extra = divmod(batch_size, world)
    first = rank * each + min(rank, extra)
    return _windows(tokens, starts[first : first + each + (rank < extra)], block_size)


def count_windows(tokens: Tokens, block_size: int) -> int:
    """How many windows sequential has at most."""
    if isinstance(tokens, Examples):
        return len(tokens.apart(block_size))
    return (len(tokens) - 1) // block_size


def sequential(tokens: Tokens, n: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """min(n, as many as fit) windows (x, y), int64 (b, block_size), evenly spaced from the first
    token to the last, no target in two of them; the same on every call. ValueError for n < 1 or
    tokens too short for the context."""
    check_length(tokens, block_size)
    check(n >= 1, f"n={n} windows", "at least 1", "give a positive number")
    if isinstance(tokens, Examples):
        starts = tokens.apart(block_size)
        places = np.linspace(0, len(starts) - 1, min(n, len(starts))).astype(np.int64)
        return _windows(tokens, starts[places], block_size)
    last = len(tokens) - 1 - block_size
    n = min(n, count_windows(tokens, block_size))
    starts = np.array([i * last // max(n - 1, 1) for i in range(n)], dtype=np.int64)
    return _windows(tokens, starts, block_size)
