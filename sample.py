"""Text from a trained run or a pretrained model, or a chat with it, through the compressed cache,
with the bytes that cache held.

    python sample.py --init_from=SmolLM2-135M-Instruct.Q4_1.gguf \\
        --prompt="The capital of France is" --temperature=0
    python sample.py --init_from=SmolLM2-135M-Instruct.Q4_1.gguf --chat \\
        --kv=select --kv_bytes=0.125
    python sample.py --out_dir=out/... --prompt="def " --max_new_tokens=200 --temperature=0
    python sample.py --out_dir=out/... --prompt_file=book.txt --park=book.parked
    python sample.py --out_dir=out/... --unpark=book.parked --prompt=" So it ends that"
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: from here on Ctrl-C is answered by one line
    from settings.begin import begin_program

    begin_program()

import contextlib
import signal
import sys
import time
from collections.abc import Iterator

from cli import exit_on_bad_input, note, parse_args
from config import KVConfig, SelectConfig, check
from measure_config import SampleConfig, check_sample_flags
from settings.base import BaseConfig
from settings.places import check_inputs, check_parked, read_prompt
from settings.storing import storage_flags, take_kind

CONFIGS = {"sample": SampleConfig, "kv": KVConfig, "select": SelectConfig, "base": BaseConfig}


def check_places(args) -> None:
    """Raise ValueError where no model is named, or it, the prompt or what is calibrated on is not
    there."""
    args.base.place(args.sample.out_dir)
    check_inputs(args, "init_from", "out_dir")
    check_parked(args.sample.park, args.sample.unpark)
    first_prompt(args)


def first_prompt(args) -> str:
    """Return the text to begin with: of --prompt_file or --prompt; in a chat, and after --unpark,
    "" where neither is given. Raises ValueError where there is none, or a file cannot be read as
    text."""
    cfg: SampleConfig = args.sample
    given = args.given & {"prompt", "prompt_file"}
    check(len(given) < 2, "prompt and prompt_file", "there is one prompt", "give one of them")
    if cfg.prompt_file:
        return read_prompt(cfg.prompt_file)
    if cfg.chat or cfg.unpark:
        return cfg.prompt if given else ""
    check(
        bool(cfg.prompt),
        "an empty prompt",
        "a text to continue is needed",
        "give --prompt=TEXT, or leave it out",
    )
    return cfg.prompt


if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__)
    exit_on_bad_input(lambda: take_kind(ARGS))
    exit_on_bad_input(lambda: check_sample_flags(ARGS.given, ARGS.sample, ARGS.kv.kv))
    exit_on_bad_input(lambda: check_places(ARGS))

import kv_router
from generate import generate
from loaders.chat import LEAST_WHOLE, Conversation, Turn
from loaders.compress import stored_as_asked
from loaders.device import autocast, check_weights
from loaders.parking import Held, put_away, take_up
from loaders.runs import Run, load_run
from loaders.split import devices_of, split
from loaders.tokenizer import TextStream, decode_after, encode_after, encoded, end_tokens
from model import Transformer
from selection.budgets import fewer_whole, small_budget
from selector import selector_of
from settings.train import DataConfig


def main() -> None:
    """Load the model that the flags name, let it store as they say, and continue or chat."""
    cfg: SampleConfig = ARGS.sample
    take_kind(ARGS)
    check_sample_flags(ARGS.given, cfg, ARGS.kv.kv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal cannot show
    device = devices_of(cfg.devices or cfg.device)[0]
    check_weights(ARGS.base.weights, device, cfg.dtype)
    prompt = first_prompt(ARGS)
    note(f"loading {ARGS.base.place(cfg.out_dir)}")
    loaded_to = "cpu" if cfg.devices else device
    run = load_run(ARGS.base.place(cfg.out_dir), loaded_to, **ARGS.base.options(cfg.out_dir))
    stored = stored_as_asked(
        run,
        ARGS.given,
        ARGS.kv,
        ARGS.select,
        corpus=cfg.calibrate,
        sequences=cfg.calibration,
        seed=cfg.seed,
        data=DataConfig(data_dir=cfg.data_dir),
    )
    talk = None
    if cfg.chat:  # says what it lacks before calibration, which takes a while
        options = options_of(cfg)
        talk = Conversation(run.model, run.tokenizer, cfg.max_new_tokens, **options)
    if run.kv.kv == "dense" and ARGS.kv.kv != "dense" and storage_flags(ARGS.given):
        n = cfg.calibration
        note(f"calibrating kv={ARGS.kv.kv} on {cfg.calibrate}, {n} sequences (--calibration)")
    with stored, autocast(device, cfg.dtype):
        if cfg.devices:
            attached = run.kv.kv == "dense" and storage_flags(ARGS.given)
            split(run.model, cfg.devices, ARGS.kv.kv if attached else run.kv.kv)
        held = take_up(cfg.unpark, run.model, cfg.chat) if cfg.unpark else None
        if talk is not None:
            if held is not None:
                talk.go_on(held)
            try:
                chat(run, talk, prompt)
            finally:  # a conversation that its context has no more room for, too
                if cfg.park and talk.cache is not None:
                    say(put_away(cfg.park, talk.held(), run.model))
        else:
            sample(run, cfg, prompt, held)


def options_of(cfg: SampleConfig) -> dict:
    """Return the settings that every call of generate gets."""
    return dict(
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        seed=cfg.seed,
        prefill_tokens=cfg.prefill_tokens,
        compiled=cfg.compile,
    )


def show(text: str) -> None:
    """Write text as it comes."""
    print(text, end="", flush=True)


def say(line: str) -> None:
    """Write a line that is not the model's."""
    print(line, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------- plain text


def sample(run: Run, cfg: SampleConfig, prompt: str, held: Held | None) -> None:
    """Continue the prompt num_samples times, after what is held; one continuation is shown as it
    comes."""
    if held is None:
        ids = encoded(run.tokenizer, prompt)
        unread = ids
    else:
        new = encode_after(run.tokenizer, run.tokenizer.decode(held.ids), prompt)
        ids = [*held.ids, *new]
        unread = [*held.pending, *new]
        check(
            bool(unread),
            f"{cfg.unpark} holds a text that has ended",
            "there is nothing to continue",
            "give --prompt=TEXT, what follows it",
        )
    if held is None:
        say_where_whole(run.model, len(ids))
    ends = end_tokens(run.tokenizer)
    stream = TextStream(run.tokenizer, ids)
    alone = cfg.num_samples == 1

    def shown(new: list[int]) -> bool:
        if len(stream.ids) == len(ids):  # not before: a request may be refused
            show(prompt)
        if new[0] not in ends:
            show(stream.add(new))
        return bool(noted)

    start = time.perf_counter()
    # what is to be put away ends between two tokens
    with noted_interrupt() if cfg.park else ended_line() as noted:
        rows, cache = generate(
            run.model,
            [unread for _ in range(cfg.num_samples)],
            cfg.max_new_tokens,
            stop=ends,
            cache=None if held is None else held.cache,
            on_token=shown if alone else None,
            **options_of(cfg),
        )
    seconds = time.perf_counter() - start
    for row in rows:
        text = stream.end() if alone else prompt + decode_after(run.tokenizer, ids, row)
        print(f"{text}\n{'-' * 20}", flush=True)
    cache.fit(0)  # an answer that ended early leaves room unused
    share = run.model.share_of_dense(cache.length * len(rows), cache)
    say(
        f"{sum(map(len, rows))} tokens in {seconds:.2f} s; the cache held {cache.nbytes():,} "
        f"bytes for {cache.length} tokens{' a row' if len(rows) > 1 else ''}, "
        f"{share:.1%} of a dense one's (floats counted with 16 bits in both)"
    )
    if cfg.park:
        say(put_away(cfg.park, Held(cache, [*ids, *rows[0]], []), run.model))


def say_where_whole(model: Transformer, length: int) -> None:
    """Say in a line where the tokens that stay whole of a prompt of `length` take more than half of
    a budget of bytes."""
    s = selector_of(model)
    line = "" if s is None else small_budget(s.kv, s.cfg.kv_bytes, length)
    if line:
        say(f"{line}: give {fewer_whole(s.kv, s.cfg.kv_bytes, 'kv_tail')}, or a longer prompt")


# ----------------------------------------------------------------------------- chat


def chat(run: Run, talk: Conversation, first: str) -> None:
    """Talk until the user leaves, the input ends or Ctrl-C. first: the first message, "" to ask for
    it."""
    say("chat: one message a line; /quit, exit or Ctrl-D ends it; Ctrl-C stops an answer")
    what = what_is_compressed(run)
    if what:
        say(what)
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        for message in messages(first):
            with noted_interrupt() as noted:
                turn = talk.say(message, show, lambda noted=noted: bool(noted))
            print(flush=True)
            say(status(run, talk, turn, bool(noted)))
    print()


def what_is_compressed(run: Run) -> str:
    """Say in a line what of a conversation is stored in part; "" where all is whole."""
    if selector_of(run.model) is not None:
        return (
            "kv=select: the first message is compressed, what follows is kept whole; once the "
            f"whole part is the longer one, and longer than {LEAST_WHOLE} tokens, the conversation "
            "is read again from its beginning and all of it is compressed"
        )
    path = next(iter(kv_router.paths(run.model).values()), None)
    if path is None:
        return ""
    kv = path.cfg
    bits = f", in {kv.key_bits} bits" if kv.ints else ""
    return (
        f"kv=value_groups: of every message, all but the newest {kv.kv_tail} tokens keep "
        f"{path.k} of {path.S} groups of each value, and whole keys{bits}"
    )


@contextlib.contextmanager
def ended_line() -> Iterator[list]:
    """Where Ctrl-C ends an answer, end its line, which the program's last word would else go on."""
    try:
        yield []
    except KeyboardInterrupt:
        print(flush=True)
        raise


@contextlib.contextmanager
def noted_interrupt() -> Iterator[list]:
    """A first Ctrl-C is only noted, in the list that this yields, so that an answer ends between
    two tokens and the cache holds what was said; a second one is a KeyboardInterrupt."""
    noted: list = []

    def note(signum, _frame) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(signum)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def messages(first: str) -> Iterator[str]:
    """Yield what the user says, empty lines left out, until /quit, exit or the input's end
    (EOFError)."""
    if first.strip():
        yield first
    while True:
        asked = sys.stdin.isatty()
        message = input("> " if asked else "")
        if not asked:  # in a log, too, it stands what is answered
            print(f"> {message}", flush=True)
        if message.strip() in ("/quit", "exit"):
            return
        if message.strip():
            yield message


def status(run: Run, talk: Conversation, turn: Turn, stopped: bool) -> str:
    """Say in a line what an answer took, and what the cache holds after it."""
    cache = talk.cache
    n = cache.length
    why = "Ctrl-C" if stopped else "--max_new_tokens"
    cut = "" if turn.ended else f" (cut: {why})"
    anew = " anew" if turn.anew else ""
    n_whole = talk.n_whole()
    whole = "" if n_whole is None else f", {n_whole} of them whole"
    return (
        f"[{turn.n_new} tokens{cut} after {turn.n_read} read{anew}, "
        f"{turn.n_new / turn.seconds:.1f} tokens/s; the cache holds {cache.nbytes():,} bytes for "
        f"{n} tokens{whole}, {run.model.share_of_dense(n, cache):.1%} of dense]"
    )


if __name__ == "__main__":
    exit_on_bad_input(main)
