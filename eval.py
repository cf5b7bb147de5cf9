"""What a stored token costs and what it buys: perplexity with the compressed values in the loop,
bytes the cache really holds.

Every number is measured through what is stored (report/rows.py says how). The flags name a plan:
methods, settings of value groups, and in each the budgets or ways to choose that are tried. All of
it is checked before anything is measured.

Writes results.json, made.json (how the rows were made) and report.png into the folder. With --json,
and where stdout is no terminal, the rows are printed as one line of JSON.

    python eval.py --init_from=model.gguf --dataset=text:PATH --kv=select --kv_bytes=0.125
    python eval.py --out_dir=out/... --methods=dense,value_groups --budgets=0.25,0.5,0.75
    python eval.py --init_from=model.gguf --tasks=continuation --methods=dense,value_groups \\
        --bases=native,pca,output --groups=4,8,16
    python eval.py --out_dir=out/SELECT --tasks=needle --kv_budgets=0.5,0.25 \\
        --relevances=predictor_query,observed
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: from here on Ctrl-C is answered by one line
    from settings.begin import begin_program

    begin_program()

import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cli import exit_on_bad_input, parse_args, print_rows, say_fewer
from config import SHARED, KVConfig, SelectConfig, check, comma_list
from measure_config import EvalConfig, check_eval_flags, with_task
from report.tables import rows_beside
from settings.base import BaseConfig
from settings.beside import check_storing
from settings.places import check_folder, check_inputs
from settings.train import DataConfig
from tasks.items import item_files, read_items
from tasks.questions import subjects

CONFIGS = {
    "eval": EvalConfig,
    "kv": KVConfig,
    "select": SelectConfig,
    "data": DataConfig,
    "base": BaseConfig,
}


def check_places(args) -> None:
    """Raise ValueError where a model is needed and none is named, it or what is read besides is not
    there or not what it should be, or results cannot be written."""
    cfg: EvalConfig = args.eval
    if comma_list(cfg.tasks) != ["mixsga"]:
        args.base.place(cfg.out_dir)
    check_inputs(args, "init_from", "out_dir")
    if not cfg.results and not Path(cfg.out_dir).is_file():
        check_folder("results", cfg.out_dir or "out")  # where they are left then
    for name in comma_list(cfg.beside):
        rows_beside(name)
    for path in item_files(cfg):
        read_items(Path(path))
    if cfg.questions:
        list(subjects(cfg.questions, cfg.shots, cfg.shots_from))


if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__)
    ARGS.eval = with_task(ARGS.given, ARGS.eval, ARGS.kv.kv)
    exit_on_bad_input(lambda: check_eval_flags(ARGS.given, ARGS.eval, ARGS.kv.kv))
    exit_on_bad_input(lambda: check_places(ARGS))

from torch import Tensor
from tqdm import tqdm

import kv_router
import lora
import mixsga
import selector
from data import batch
from loaders import checkpoint
from loaders.device import check_weights, device_name, pick_device
from loaders.runs import Run, attach_storage, is_foreign, load_run
from report.against_bytes import bytes_figure, points_of
from report.figures import groups_figure, report_figure
from report.made import write_record
from report.plan import STORED_AS, Asked, Setting, bits_of, is_trained, plan_of
from report.progress import EVERY, progress, say
from report.rivals import Rival, in_place, rivals_of
from report.rows import (
    RowAbout,
    chosen,
    kept_groups,
    measure_row,
    sweep,
    sweep_choices,
    whole_value,
)
from report.tables import mean_over_texts, result_table, reuse_note
from report.texts import calibration_windows, read_texts, window_of
from selection.budgets import fewer_whole, small_budget
from tasks.common import Prompts, Task
from tasks.make import READING, make_tasks
from tasks.text import Text
from tasks.zero_shot import ZeroShot
from training import mixsga_table
from training.shared_heads import TAIL

# What is not asked for is small where a base is pretrained here.
MINIATURE = dict(batch_size=8, sequences=48, steps=20, lr=5e-4)


class Shown(NamedTuple):
    """What pictures are drawn from: masks (layers, T, S) of one sequence, share of heads; what
    selection kept of a prompt, and by which rule."""

    masks: Tensor | None = None
    choice: selector.Selection | None = None
    rule: str = ""


# -- measuring the plan


class Work(NamedTuple):
    """What all settings share: the run, what is asked of it, the tasks, the texts that are read
    (none where the tasks make their own), and the tasks' dense values, where they are known."""

    run: Run
    asked: Asked
    methods: list[str]
    todo: list[Task]
    texts: list[Text]
    known: dict[tuple[str, str], float]
    bar: tqdm | None = None  # of the rows

    def cells(self) -> Iterator[tuple[Task, dict]]:
        """Every task in all bits."""
        return itertools.product(self.todo, bits_of(self.asked))


def evaluate(run: Run, asked: Asked) -> tuple[list[dict], Shown]:
    """The rows eval.py prints, and what its pictures show."""
    cfg = asked.eval
    window = window_of(run, cfg)
    methods, plan = plan_of(run, asked)
    rivals = rivals_of(run, asked, methods)
    texts = []
    if {*comma_list(cfg.tasks)} & {*READING}:  # the other tasks make their own text
        texts = read_texts(run, asked)
    todo = make_tasks(cfg, run, window, texts, asked.data.template)
    say_where_few(todo, cfg.sequences)
    if "select" in methods:
        check_contexts(todo, cfg.query)
    calibration = None
    if (plan or any(rival.calibrated for rival in rivals)) and not is_trained(run):
        calibration = calibration_windows(run, asked, window, texts)
    work = Work(run, asked, methods, todo, texts, {})
    work = work._replace(bar=bar_of(work, plan, rivals))
    with work.bar:
        rows, shown = measure(work, plan, rivals, calibration)
    check(
        bool(rows),
        f"methods={cfg.methods} with fewer than 16 bits",
        "whole values have 16",
        "give another of --methods, or --kv_bits=16",
    )
    return rows, shown


def say_where_few(todo: list[Task], asked: int) -> None:
    """Say where a text, or a file of questions, has fewer sequences than are asked for."""
    for task in todo:
        n = len(task.prompts if isinstance(task, (Prompts, ZeroShot)) else task.x)
        where = f" of {task.text['corpus']}, {task.text['split']}" if task.text else ""
        say_fewer(f"{task.name}{where}", n, asked)


def say_where_whole(task: Task, kv: KVConfig, ways: list[SelectConfig]) -> None:
    """Say in a line where the tokens that stay whole take more than half of a budget of bytes."""
    for kv_bytes in sorted({way.kv_bytes for way in ways}):
        line = small_budget(kv, kv_bytes, task.stored.size(1))
        if line:
            fewer = fewer_whole(kv, kv_bytes, "query")
            say(f"{task.name}: {line}: give {fewer}, or longer contexts")


def bar_of(work: Work, plan: list[Setting], rivals: list[Rival]) -> tqdm:
    """The bar of all rows, of those at most that will be measured."""
    tasks = len(work.todo)
    cells = tasks * len(bits_of(work.asked))
    whole = tasks if has_dense_rows(work) else 0
    if work.run.kv.kv in SHARED:
        whole = cells
    tried = sum(len(setting.tried) for setting in plan)
    total = whole + cells * tried + tasks * len(rivals)
    return progress("measuring", total, "row", silence=EVERY)


def has_dense_rows(work: Work) -> bool:
    """Whether the base is measured as it is."""
    return "dense" in work.methods and not is_trained(work.run)


def measure(
    work: Work, plan: list[Setting], rivals: list[Rival], calibration: list[Tensor] | None
) -> tuple[list[dict], Shown]:
    """The rows of the whole model, of every setting of the plan and of every rival, and what
    pictures show."""
    run = work.run
    asked = work.asked
    cfg = asked.eval
    rows = whole_rows(work)
    work.known.update({name_of(r["task"], r.get("text")): r["value"] for r in rows})
    shown = Shown()
    for setting in plan:
        if calibration is not None:
            select = setting.tried[0] if setting.selects else asked.select
            model = selector.detach(run.model)
            attach_storage(model, setting.kv, select, calibration, cfg.seed)
        measured = measure_ways if setting.selects else measure_ks
        got, seen = measured(work, setting)
        rows += got
        shown = seen or shown
    for rival in rivals:
        rows += measure_rival(work, rival, calibration)
    return rows, shown


@contextmanager
def row_of(work: Work, task: Task, what: str) -> Iterator[None]:
    """Say which row is begun, and count it in the bar once it is measured."""
    of_text = f" of {task.text['corpus']}" if task.text else ""
    say(f"row {work.bar.n + 1} of {work.bar.total}: {what}, {task.name}{of_text}")
    yield
    work.bar.update()


def name_of(task: str, text: dict | None) -> tuple[str, str]:
    """What tells one task's values from another's: its name, and the sha256 of what it reads."""
    return task, text["sha256"] if text else ""


def check_contexts(todo: list[Task], query: int) -> None:
    """Raise ValueError where a prompt is no longer than the query that is never compressed."""
    lengths = [task.stored.size(1) for task in todo if task.stored.size(1) <= (task.query or 0)]
    check(
        not lengths,
        f"query={query}",
        f"prompts of {min(lengths, default=0)} tokens have no context then",
        "give a smaller --query",
    )


def about_row(run: Run, cfg: EvalConfig, kv: KVConfig) -> RowAbout:
    """What a row of this run says of it."""
    return RowAbout(
        adapter=run.adapter,
        kv=kv,
        seed=run.config.get("seed", cfg.seed),
        batch_size=cfg.batch_size,
        dtype=cfg.dtype,
        params=run.config.get("trainable_parameters", 0),
    )


def whole_rows(work: Work) -> list[dict]:
    """The rows before those of the plan: a base as it is, or heads that are shared, in all bits."""
    run = work.run
    asked = work.asked
    cfg = asked.eval
    model = run.model
    rows = []
    if run.kv.kv not in SHARED:
        for task in work.todo if has_dense_rows(work) else ():
            with row_of(work, task, "dense"):
                rows.append(measure_row(model, task, about_row(run, cfg, run.kv)))
        return rows
    for bits in bits_of(asked):
        bits.pop("kv_sinks", None)
        # what rows of integers after it are compared with
        known = [r for r in rows if r["key_bits"] == 16]
        whole = {name_of(r["task"], r.get("text")): r["value"] for r in known}
        about = about_row(run, cfg, replace(run.kv, **bits))
        with mixsga.stored_in(model, **bits):
            for task in work.todo:
                dense = whole.get(name_of(task.name, task.text))
                with row_of(work, task, run.kv.kv):
                    rows.append(measure_row(model, task, about, dense))
    return rows


def stored_for(task: Task, kv: KVConfig, bits: dict) -> KVConfig:
    """A setting in these bits, its tail the task's query."""
    if task.query is None:
        return replace(kv, **bits)
    return replace(kv, **bits, kv_tail=task.query, kv_tail_block=1)


def storing(run: Run, kv: KVConfig):
    """The context in which the model stores with this setting's tail and bits."""
    names = ("kv_tail", "kv_tail_block", *STORED_AS)
    return kv_router.storing(run.model, **{name: getattr(kv, name) for name in names})


def dense_value(work: Work, task: Task, kv: KVConfig) -> float | None:
    """What a setting's rows are compared with: the base, where adapters have learned from it. For
    those and for integers it is measured where it is not known; others measure it themselves."""
    name = name_of(task.name, task.text)
    run = work.run
    cfg = work.asked.eval
    taught = run.adapter.adapter != "none" and run.config.get("objective") == "distill"
    if name not in work.known and (kv.ints or taught):
        with lora.switched_off(run.model) if taught else nullcontext():
            work.known[name] = whole_value(run.model, task, cfg.batch_size, cfg.dtype)
    return work.known.get(name)


def measure_ks(work: Work, setting: Setting) -> tuple[list[dict], Shown | None]:
    """Rows of value groups: every task, in all bits, with every number of groups kept; and the
    groups that some text keeps."""
    cfg = work.asked.eval
    model = work.run.model
    rows = []
    for task, bits in work.cells():
        stored = stored_for(task, setting.kv, bits)
        with storing(work.run, stored):
            dense = dense_value(work, task, stored)
            if setting.tried:
                about = about_row(work.run, cfg, stored)
                got = sweep(model, task, setting.tried, about, dense, partial(row_of, work, task))
                if is_trained(work.run) and "dense" in work.methods:
                    got[0]["name"] = "whole"  # all groups of a model that was trained to keep K
                rows += got
    if not setting.tried:
        return rows, None
    some = work.todo[0].stored[:1, :512]
    if work.texts:
        text = work.texts[0].tokens
        some = batch(text, "masks", cfg.seed, 0, 1, min(window_of(work.run, cfg), 512))[0]
    return rows, Shown(kept_groups(model, some, cfg.dtype))


def measure_ways(work: Work, setting: Setting) -> tuple[list[dict], Shown | None]:
    """Rows of selection: every task, in all bits, with every way to choose; and what the last way
    keeps of the first task's first prompt."""
    cfg = work.asked.eval
    model = work.run.model
    rows = []
    shown = None
    for task, bits in work.cells():
        stored = stored_for(task, setting.kv, bits)
        ways = setting.tried
        if is_trained(work.run) and "dense" in work.methods and stored.ints:
            ways = ways[1:]  # the first is the dense row, which has no integers
        # Levels need a budget of bytes.
        ways = [way for way in ways if stored.value_bits or way.kv_bytes]
        with storing(work.run, stored):
            dense = dense_value(work, task, stored)
            if not ways:
                continue
            if task.text in (None, work.todo[0].text):  # once for all texts
                say_where_whole(task, stored, ways)
            about = about_row(work.run, cfg, stored)
            begin = partial(row_of, work, task)
            rows += sweep_choices(model, task, ways, about, dense, begin)
            if task is work.todo[0]:
                model.selector.set(ways[-1])
                choice = chosen(model, task.stored[:1], cfg.dtype)
                masks = (choice.mask > 0)[:, 0].float().mean(1).cpu()
                shown = Shown(masks, choice, ways[-1].described())
    return rows, shown


def measure_rival(work: Work, rival: Rival, calibration: list[Tensor] | None) -> list[dict]:
    """Rows of a rival with a path of its own: every task, each with the base's value as its dense
    one."""
    cfg = work.asked.eval
    model = work.run.model
    rows = []
    for task in work.todo:
        name = name_of(task.name, task.text)
        with row_of(work, task, rival.method):
            if name not in work.known:
                selector.detach(model)
                work.known[name] = task.value(model, cfg.batch_size, cfg.dtype, True)
            with in_place(model, rival, task, cfg.quest_whole, calibration, cfg.seed) as kv:
                about = about_row(work.run, cfg, kv)
                rows.append(measure_row(model, task, about, work.known[name]))
    return rows


# -- the program


def fresh_folder(what: str) -> str:
    """A name under out/ that no other call has."""
    return f"out/{what}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def results_folder(cfg: EvalConfig, run: Run) -> Path:
    """--results, else the folder of the stage that is evaluated, else a fresh one under out/; it
    exists then."""
    if cfg.results:
        folder = Path(cfg.results)
    elif cfg.out_dir:
        folder = run.path.parent
    else:
        folder = Path(fresh_folder("eval"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_results(
    folder: Path, run: Run, rows: list[dict], beside: list[dict], shown: Shown, *, own: bool
) -> list[str]:
    """Leave results.json and the pictures in the folder, bytes.png of means over texts; returns
    their names. own: the run is one of train.py's, whose curves are shown."""
    metrics = run.path.parent / "metrics.jsonl"
    curves = {}
    if own and metrics.is_file():
        curves[run.path.parent.name] = checkpoint.read_jsonl(metrics)
    names = ["results.json", "report.png"]
    means = mean_over_texts(rows)
    report_figure(folder, rows, curves, shown.masks)
    if shown.choice is not None:
        groups_figure(folder, shown.choice, shown.rule)
        names.append("groups.png")
    checkpoint.write_json(folder / "results.json", rows)
    points = points_of(means + beside)
    if points:
        bytes_figure(folder / "bytes.png", points)
        names.append("bytes.png")
    return names


def measure_run(args) -> None:
    """Measure a run or a pretrained model as the flags ask, and print the table."""
    began = time.time()
    cfg: EvalConfig = args.eval
    device = pick_device(cfg.device)
    check_weights(args.base.weights, device, cfg.dtype)
    check_places(args)
    check(
        not (cfg.out_dir and is_foreign(cfg.out_dir)),
        f"out_dir={cfg.out_dir}",
        "is no run of train.py",
        "give it as --init_from",
    )
    say(f"loading {args.base.place(cfg.out_dir)} ...")
    run = load_run(args.base.place(cfg.out_dir), device, **args.base.options(cfg.out_dir))
    beside = [r for name in comma_list(cfg.beside) for r in mean_over_texts(rows_beside(name))]
    rows, shown = evaluate(run, asked_of(run, args))
    folder = results_folder(cfg, run)
    names = write_results(folder, run, rows, beside, shown, own=bool(cfg.out_dir))
    write_record(folder, device_name(device), began, args)
    names.append("made.json")
    files = ", ".join(f"{folder}/{name}" for name in names)
    print(f"{result_table(rows)}{reuse_note(rows)}\n{files}", file=sys.stderr)
    print_rows(rows, cfg.json)


def asked_of(run: Run, args) -> Asked:
    """The flags over what the run itself says: how its text was prepared, how it chooses."""
    prepared = {k: v for k, v in run.config.get("data", {}).items() if k not in args.given}
    names = {f.name for f in fields(SelectConfig)} & args.given
    cfg: EvalConfig = args.eval
    if run.kv.kv == "select" and "tasks" not in args.given:
        cfg = replace(cfg, tasks="continuation")
    if is_trained(run) and "query" not in args.given:
        cfg = replace(cfg, query=run.kv.kv_tail)
    return Asked(
        eval=cfg,
        kv=args.kv,
        select=replace(run.select, **{name: getattr(args.select, name) for name in names}),
        data=replace(args.data, **prepared),
        given=frozenset(args.given),
    )


def train_table(args) -> None:
    """--tasks=mixsga: rows that are trained here."""
    began = time.time()
    cfg: EvalConfig = args.eval
    place = ""
    if cfg.out_dir or args.base.init_from != "scratch":
        place = args.base.place(cfg.out_dir)
    else:
        cfg = replace(cfg, **{k: v for k, v in MINIATURE.items() if k not in args.given})
    kv = args.kv if "kv_tail" in args.given else replace(args.kv, kv_tail=TAIL)
    check_storing(args.given, kv, args.select)
    check(
        "n_groups" not in args.given or "+" in cfg.mixes,
        f"n_groups with mixes={cfg.mixes}",
        "no value groups are kept",
        "leave it out, or give for example --mixes=3:1:6+2",
    )
    folder = Path(cfg.results or fresh_folder("mixsga"))
    rows = mixsga_table.run_table(
        cfg,
        kv,
        args.data,
        place=place,
        options=args.base.options(cfg.out_dir),
        folder=folder,
    )
    write_record(folder, device_name(pick_device(cfg.device)), began, args)
    print_rows(rows, cfg.json)


def main(args) -> None:
    """Print the rows that the flags ask for, measured or trained here."""
    args.eval = with_task(args.given, args.eval, args.kv.kv)
    check_eval_flags(args.given, args.eval, args.kv.kv)
    if comma_list(args.eval.tasks) == ["mixsga"]:
        train_table(args)
    else:
        measure_run(args)


if __name__ == "__main__":
    exit_on_bad_input(lambda: main(ARGS))
