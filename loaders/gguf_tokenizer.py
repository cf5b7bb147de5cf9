"""The tokenizer of a .gguf file, written as the tokenizer.json that the model's own folder has.

Byte-level BPE of the families in CUTS, and SentencePiece (`llama`), whose scores become merges.
"""

from __future__ import annotations

from pathlib import Path

from config import check
from settings.fields import one_line

AGAIN = "get the file again"
THE_FOLDER = "load the model's Hugging Face folder instead"

# How text is cut before merging, as in the models' own tokenizer.json: steps before the one that
# turns text into bytes, by the name that llama.cpp gives them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = (  # \u where Unicode's NFC, which tools apply unasked, would make another character of it
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄ"
    "Ⰰ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
CJK = "[一-龥ࠀ-一가-퟿]+"
DEEPSEEK_LLM = ["[\r\n]", rf"\s?[{CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK]
DEEPSEEK_CODER = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK]
DIGITS = {"type": "Digits", "individual_digits": True}
CUTS = {
    "gpt-2": [],
    "gpt2": [],
    "smollm": [DIGITS],
    "starcoder": [DIGITS],
    "refact": [DIGITS],
    "llama-bpe": [LLAMA3],
    "llama3": [LLAMA3],
    "llama-v3": [LLAMA3],
    "tekken": [TEKKEN],
    "qwen2": [QWEN2],
    "deepseek-r1-qwen": [QWEN2],
    "deepseek-llm": [*DEEPSEEK_LLM, DIGITS],
    "deepseek-coder": [*DEEPSEEK_CODER, DIGITS],
}
WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "tekken")  # and a text begins with bos

NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
LONGEST = 1024  # characters of a SentencePiece token, each of which may be where it is cut
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def gguf_definition(fields: dict, path: Path) -> dict | None:
    """Write a GGUF file's tokenizer.ggml.* fields as a tokenizer.json, parsed; None where it has
    none. ValueError, one line, for what cannot be read."""
    prefix = "tokenizer.ggml."
    if f"{prefix}model" not in fields:
        return None
    tok = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    try:
        return definition_from_gguf(tok)
    except KeyError as e:
        raise ValueError(
            f"{path}: its tokenizer lacks {e}; use another file of this model"
        ) from None
    except TypeError as e:
        raise ValueError(
            f"{path}: its tokenizer is damaged ({one_line(e)}); copy it again"
        ) from None


def definition_from_gguf(tok: dict) -> dict:
    """Write a GGUF file's tokenizer as a tokenizer.json, parsed.

    tok: the fields after tokenizer.ggml. Read are model; tokens and token_type, (V,) in the order
    of their ids; merges, 'a b' each, and pre, one of CUTS, or scores, (V,), for SentencePiece;
    bos_token_id, add_bos_token, add_space_prefix, unknown_token_id. ValueError for another kind,
    KeyError or TypeError for a damaged one."""
    tokens = tok["tokens"]
    vocab = _vocabulary(tokens, tok["token_type"])
    kinds = {
        "gpt2": _byte_level,
        "llama": _sentencepiece,
    }
    model = tok["model"]
    check(
        model in kinds,
        f"a GGUF tokenizer of model {model!r}",
        "gpt2, byte-level BPE, and llama, SentencePiece, are read",
        THE_FOLDER,
    )
    begins, parts = kinds[model](tok, vocab)
    bos = tok.get("bos_token_id")
    begins = tok.get("add_bos_token", begins and bos is not None)
    check(
        not begins or (type(bos) is int and 0 <= bos < len(tokens)),
        f"a GGUF tokenizer with bos={bos}",
        f"add_bos needs an id 0..{len(tokens) - 1}",
        AGAIN,
    )
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocab, tok["token_type"]),
        **parts,
        "post_processor": _begin_with(bos, tokens[bos]) if begins else None,
        "model": {**bpe, **parts["model"]},
    }


def _vocabulary(tokens: list[str], token_types: list[int]) -> dict[str, int]:
    """Map each token that is used to its id."""
    check(
        len(tokens) == len(token_types),
        f"{len(tokens)} GGUF tokens with {len(token_types)} types",
        "one type for each",
        AGAIN,
    )
    for i, kind in enumerate(token_types):
        if not NORMAL <= kind <= BYTE:
            raise ValueError(
                f"GGUF token {i} {tokens[i]!r} of type {kind}: types {NORMAL} to {BYTE} are read; "
                f"{THE_FOLDER}"
            )
    vocab = {t: i for i, t in enumerate(tokens) if token_types[i] != UNUSED}
    n_used = sum(t != UNUSED for t in token_types)
    check(len(vocab) == n_used, "GGUF tokens that occur twice", "each has one id", AGAIN)
    return vocab


def _added_tokens(vocab: dict[str, int], token_types: list[int]) -> list[dict]:
    """List the tokens that are added to the vocabulary: unknown, control and user-defined ones."""
    return [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token_types[i] != USER_DEFINED,
        }
        for t, i in vocab.items()
        if token_types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _byte_level(tok: dict, vocab: dict[str, int]) -> tuple[bool, dict]:
    """Return whether a text begins with bos where the file does not say, and the parts of the
    tokenizer.json that are byte-level BPE's."""
    pre = tok.get("pre", "default")
    check(pre in CUTS, f"a GGUF pre-tokenizer {pre!r}", f"one of {', '.join(CUTS)}", THE_FOLDER)
    whole = pre in WHOLE_PIECES
    steps = [_split(step) if isinstance(step, str) else step for step in CUTS[pre]]
    # ByteLevel cuts as GPT-2 does, unless a pattern has done it
    by_regex = all(step is DIGITS for step in steps)
    pre_tokenizer = {
        "type": "Sequence",
        "pretokenizers": [*steps, {**BYTE_LEVEL, "use_regex": by_regex}],
    }
    return whole, {
        "normalizer": {"type": "NFC"} if CUTS[pre] == [QWEN2] else None,
        "pre_tokenizer": pre_tokenizer if steps else {**BYTE_LEVEL},
        "decoder": {**BYTE_LEVEL},
        "model": {"ignore_merges": whole, "merges": list(tok["merges"])},
    }


def _split(regex: str) -> dict:
    """Write the step that cuts text at what a pattern matches, which stays a piece."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _sentencepiece(tok: dict, vocab: dict[str, int]) -> tuple[bool, dict]:
    """Return that a text begins with bos where the file does not say, and the parts of the
    tokenizer.json that are SentencePiece's, as in that of Llama 2."""
    blanks = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if tok.get("add_space_prefix", True):
        blanks.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = tok["tokens"][tok.get("unknown_token_id", 0)]
    return True, {
        "normalizer": {"type": "Sequence", "normalizers": blanks},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "merges": _merges(vocab, tok["scores"], tok["token_type"]),
        },
    }


def _merges(vocab: dict[str, int], scores: list[float], token_types: list[int]) -> list[list[str]]:
    """List every pair of tokens that joins to a normal token, the token of the highest score first:
    SentencePiece merges by score. Of the pairs of one token the longest left one is first."""
    longest = max(map(len, vocab))
    check(longest <= LONGEST, f"a GGUF token of {longest} characters", f"at most {LONGEST}", AGAIN)
    joined = []
    for t, i in vocab.items():
        if token_types[i] != NORMAL:
            continue
        for cut in range(1, len(t)):
            if t[:cut] in vocab and t[cut:] in vocab:
                joined.append((-scores[i], i, -cut, [t[:cut], t[cut:]]))
    joined.sort()
    return [pair for *_, pair in joined]


def _begin_with(bos: int, token: str) -> dict:
    """Write the post_processor that puts one token before a text, and before each of a pair."""
    text = [{"Sequence": {"id": x, "type_id": n}} for n, x in enumerate("AB")]
    first = [{"SpecialToken": {"id": token, "type_id": n}} for n in (0, 1)]
    return {
        "type": "TemplateProcessing",
        "single": [first[0], text[0]],
        "pair": [first[0], text[0], first[1], text[1]],
        "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
    }
