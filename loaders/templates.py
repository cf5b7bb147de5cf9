"""What a model's files say of a conversation, and a conversation written as the model expects it.

`gguf_chat` and `folder_chat` read the chat template, the special tokens that it names, and the ids
that end an answer. `ChatTemplate` renders messages with it and encodes them: special tokens come
from the template alone, never from what somebody typed.

A template is a program in jinja2, an optional extra; it runs in its immutable sandbox.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from pathlib import Path
from typing import NamedTuple

from config import check
from loaders.huggingface import read_json
from loaders.tokenizer import encode_after
from settings.fields import one_line

# special tokens that a template may name, and what GGUF calls them
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
GGUF_ENDS = ("eos", "eot", "eom")
# Around a message's number stand two characters of private use, and around them blanks that
# templates do not have: where one is gone, the template strips its messages there.
MARK = "\u2003\ue000{}\ue001\u2003"
MARKED = re.compile("(\u2003?)\ue000([0-9]+)\ue001(\u2003?)")
COPY = "copy the model's files again"


class ChatFiles(NamedTuple):
    """What files say. template: jinja2 text, or ""; names: special tokens by the names that
    templates use; ends: ids that end an answer, the files' first choice first."""

    template: str
    names: dict[str, str]
    ends: list[int]


def gguf_chat(fields: dict, where: str) -> ChatFiles:
    """Read a .gguf file's fields. ValueError, one line, for a template that is no text."""
    tokens = fields.get("tokenizer.ggml.tokens", [])

    def id_of(kind: str) -> int | None:
        i = fields.get(f"tokenizer.ggml.{kind}_token_id")
        return i if type(i) is int and 0 <= i < len(tokens) else None

    names = {name: tokens[id_of(kind)] for name, kind in NAMED.items() if id_of(kind) is not None}
    ends = [id_of(kind) for kind in GGUF_ENDS if id_of(kind) is not None]
    template = fields.get("tokenizer.chat_template", "")
    check(isinstance(template, str), f"{where}: its chat template", "is no text", COPY)
    return ChatFiles(template, names, ends)


def folder_chat(folder: Path, definition: dict) -> ChatFiles:
    """Read generation_config.json, config.json, tokenizer_config.json and chat_template.jinja of a
    Hugging Face folder, as far as they are there. definition: its tokenizer.json, parsed. Raises
    ValueError, one line, for what is damaged."""
    about = _optional_json(folder / "special_tokens_map.json")
    about |= _optional_json(folder / "tokenizer_config.json")
    names = {}
    for name in NAMED:
        token = about.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            names[name] = token
    ends = []
    for file in ("generation_config.json", "config.json"):
        ends += _ids(_optional_json(folder / file).get("eos_token_id"), folder / file)
    added = {t["content"]: t["id"] for t in definition.get("added_tokens") or []}
    if names.get("eos_token") in added:
        ends.append(added[names["eos_token"]])
    return ChatFiles(_folder_template(folder, about), names, list(dict.fromkeys(ends)))


def _optional_json(path: Path) -> dict:
    """Read a JSON object; an absent file is an empty one."""
    return read_json(path) if path.is_file() else {}


def _ids(value: object, path: Path) -> list[int]:
    """Return eos_token_id, one id, several, or none, as a list."""
    ids = value if isinstance(value, list) else [value]
    ids = [i for i in ids if i is not None]
    fine = all(type(i) is int for i in ids)
    check(fine, f"{path}: eos_token_id={value!r}", "ids are whole numbers", COPY)
    return ids


def _folder_template(folder: Path, about: dict) -> str:
    """Return the template of a folder, "" where it has none: its own file's, else that of
    tokenizer_config.json, of several the one that is called default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} cannot be read as text ({one_line(e)}); {COPY}") from None
    found = about.get("chat_template") or ""
    if isinstance(found, list):
        several = [t for t in found if isinstance(t, dict)]
        found = next((t.get("template") for t in several if t.get("name") == "default"), "")
    check(isinstance(found, str), f"{folder}: its chat_template", "is no text", COPY)
    return found


def take_chat(tokenizer, chat: ChatFiles) -> None:
    """Let a tokenizer know what its model's files say. Ids that it has no token for are dropped:
    they never come."""
    tokenizer.chat = chat
    tokenizer.ends = tuple(i for i in chat.ends if 0 <= i < tokenizer.vocab_size)


def chat_entry(tokenizer) -> dict:
    """Return the entry of a checkpoint's config that says what its tokenizer knows of
    conversations, in JSON types; empty where it knows nothing."""
    chat = getattr(tokenizer, "chat", None)
    return {} if chat is None else {"chat": chat._asdict()}


def take_entry(tokenizer, config: dict, where: str) -> None:
    """Let a tokenizer know what a checkpoint's config says of conversations, if anything. Raises
    ValueError for what chat_entry does not write."""
    entry = config.get("chat")
    if entry is None:
        return
    kinds = {"template": str, "names": dict, "ends": list}
    fits = isinstance(entry, dict) and set(entry) == set(kinds)
    fits = fits and all(isinstance(entry[name], kind) for name, kind in kinds.items())
    fits = fits and all(type(i) is int for i in entry["ends"])
    check(fits, f"{where}: its chat", "is no template, names and ids", COPY)
    take_chat(tokenizer, ChatFiles(**entry))


# ----------------------------------------------------------------------------- rendering


class Piece(NamedTuple):
    """A part of a rendered conversation. message: its number; None: the template wrote it."""

    text: str
    message: int | None


class ChatTemplate:
    """A tokenizer's chat template. Messages are dicts of role (user, assistant, system) and
    content. ValueError where the model has no template, or one that fails."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        chat = getattr(tokenizer, "chat", None)
        check(
            chat is not None and bool(chat.template),
            "chat with this model",
            "its files hold no chat template",
            "leave --chat out, or take a model that was trained to chat (Instruct)",
        )
        self.names = chat.names
        with _in_one_line("cannot be read"):
            self.template = _sandbox().from_string(chat.template)
        definition = tokenizer.definition
        added = definition.get("added_tokens") or []
        self.special = {
            t["content"]: t["id"] for t in added if t.get("special") or t["id"] == tokenizer.eot
        }
        self.special_ids = set(self.special.values())
        longest_first = sorted(self.special, key=len, reverse=True)
        self.spelled = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.ends = self._ends()

    def _ends(self) -> list[int]:
        """List the ids that end an answer: those that files name, the one that ends a document, and
        what the template writes after an answer."""
        ends = [*self.tokenizer.ends, self.tokenizer.eot]
        turns = [{"role": r, "content": ""} for r in ("user", "assistant", "user")]
        after = self.tokenizer.encode(self.after_answer(turns)[0].text, special=True)
        if after and after[0] in self.special_ids:
            ends.append(after[0])
        return list(dict.fromkeys(ends))

    def render(self, messages: list[dict]) -> list[Piece]:
        """Write a conversation, up to where the next answer begins, in pieces of the template's
        text and of messages. ValueError for a template that fails, or does not write every message
        once and in order."""
        marked = [m | {"content": MARK.format(i)} for i, m in enumerate(messages)]
        with _in_one_line("fails"):
            text = self.template.render(
                messages=marked,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self.names,
            )
        written, blanks_before, numbers, blanks_after = _split(text)
        check(
            numbers == list(range(len(messages))),
            f"a chat template that writes the messages {numbers}",
            f"all {len(messages)} are needed, once and in order",
            "leave --chat out",
        )
        pieces = [Piece(written[0], None)]
        for i, message in enumerate(messages):
            content = message["content"]
            content = content if blanks_before[i] else content.lstrip()
            content = content if blanks_after[i] else content.rstrip()
            pieces += [Piece(content, i), Piece(written[i + 1], None)]
        return pieces

    def after_answer(self, messages: list[dict]) -> list[Piece]:
        """Return the pieces after the last answer, all of them where there is none: what a cache
        that holds the conversation so far has not read."""
        pieces = self.render(messages)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not answers:
            return pieces
        at = next(n for n, piece in enumerate(pieces) if piece.message == answers[-1])
        return pieces[at + 1 :]

    def encode(self, pieces: list[Piece], before: str = "") -> list[int]:
        """Return the ids of pieces. before: the text that they follow, which is not encoded.

        All is encoded as one, as the model saw it in training. Where a message spells a special
        token, that stays text: then what lies between the template's own special tokens is encoded
        part by part."""
        whole = "".join(piece.text for piece in pieces)
        ids = encode_after(self.tokenizer, before, whole, special=True)
        own = []
        for piece in pieces:
            if piece.message is None:
                own += self._specials(self.tokenizer.encode(piece.text, special=True))
        if self._specials(ids) == own:
            return ids
        ids = []
        plain = ""
        for piece in pieces:
            parts = [piece.text] if piece.message is not None else self.spelled.split(piece.text)
            for part in parts:
                if piece.message is None and part in self.special:
                    ids += [*self.tokenizer.encode(plain), self.special[part]]
                    plain = ""
                else:
                    plain += part
        return ids + self.tokenizer.encode(plain)

    def _specials(self, ids: list[int]) -> list[int]:
        """Return the special tokens among ids."""
        return [i for i in ids if i in self.special_ids]


def _split(text: str) -> tuple[list[str], list[str], list[int], list[str]]:
    """Split a rendered text at its marks: what the template wrote, and of each mark the blank
    before it, its number, and the blank after it."""
    parts = MARKED.split(text)
    return parts[::4], parts[1::4], [int(n) for n in parts[2::4]], parts[3::4]


def _sandbox():
    """Return the environment that templates are written for, in which they change and reach nothing
    of ours. ValueError where jinja2 is missing."""
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(
            "chat: a model's chat template runs in the package jinja2; pip install jinja2"
        ) from None

    def refuse(message: str):
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda how: datetime.datetime.now().strftime(how)
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    return env


@contextlib.contextmanager
def _in_one_line(what: str):
    """Make a ValueError of whatever a template raises."""
    try:
        yield
    except Exception as e:
        if isinstance(e, ValueError) and str(e).startswith("chat: "):
            raise
        raise ValueError(
            f"the model's chat template {what} ({one_line(e)}); leave --chat out, or use another "
            "file of this model"
        ) from None
