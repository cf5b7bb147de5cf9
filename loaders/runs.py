"""What a run of train.py left, put together again; and models that other projects wrote.

A checkpoint folder of ours holds model.safetensors (a base), adapter.safetensors (adapters, value
routers and bases, with the base they belong to) or selector.safetensors (bases and predictors,
likewise), config.json and a manifest. A model of others is a Hugging Face folder, a .gguf file, or
hf:ORG/NAME from the hub; an adapter of others is a folder that PEFT wrote, or one of the hub.
`load_run` takes any of all these.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import kv_router
import lora
import selector
from baselines import shared_heads
from config import SHARED, KVConfig, ModelConfig, SelectConfig, check
from loaders import checkpoint
from loaders.device import place
from loaders.download import hub_folder
from loaders.gguf import all_parts, is_gguf, open_gguf
from loaders.huggingface import model_config, open_folder, read_json
from loaders.peft_folder import is_peft, open_peft
from loaders.templates import folder_chat, take_chat, take_entry
from loaders.tokenizer import get_tokenizer
from loaders.tokenizer_json import from_definition
from loaders.weights import (
    ModelFiles,
    build_model,
    check_shapes,
    load_model_state,
    weights_hash,
    with_own_head,
)
from model import Transformer
from settings.adapters import AdapterConfig
from settings.experts import MixConfig
from settings.fields import from_dict, to_dict, to_file
from settings.files import refuse_pointers
from settings.places import check_model
from settings.storing import check_not_shared
from settings.train import TOKENIZERS
from storage.state import few

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # endings of files that can run code


@dataclass
class Run:
    """A loaded model and where it came from. base: the base checkpoint's folder or the pretrained
    model's files, as a later load needs it; base_sha256: of its weights."""

    model: Transformer
    tokenizer: object
    path: Path
    config: dict
    adapter: AdapterConfig
    kv: KVConfig
    base: str
    base_sha256: str
    select: SelectConfig = field(default_factory=SelectConfig)


def load_run(
    where: str | os.PathLike,
    device: torch.device | str = "cpu",
    *,
    base: str = "",
    weights: str = "float32",
    revision: str = "",
) -> Run:
    """Load base, value groups and adapters of a checkpoint, stage or run folder of ours, or a
    pretrained model (see load_pretrained).

    base: where the base of an adapter lies now, if it was moved. ValueError names what is damaged
    or does not fit."""
    options = dict(weights=weights, revision=revision)
    refuse_pointers(_files_at(Path(where)))
    if str(where).startswith("hf:"):
        folder = hub_folder(str(where)[3:], revision)
        if is_peft(folder):
            return _peft_run(folder, base, device, options | {"revision": ""})
        _refuse_base(where, base)
        return load_pretrained(where, device, **options, folder=folder)
    if is_peft(where):
        return _peft_run(Path(where), base, device, options)
    if is_foreign(where):
        _refuse_base(where, base)
        return load_pretrained(where, device, **options)
    path = find_checkpoint(where)
    refuse_pointers(_files_at(path))
    ckpt = checkpoint.load(path)
    entries = {"model", "tokenizer", "adapter", "kv"}
    check(
        entries <= set(ckpt.config),
        f"{path}/config.json",
        f"lacks {sorted(entries - set(ckpt.config))}",
        "was it written by train.py?",
    )
    if "base" not in ckpt.config:
        _refuse_base(where, base)
        return _base_run(ckpt, device, weights)
    return _added_run(ckpt, base, device, options)


def _refuse_base(where: str | os.PathLike, base: str) -> None:
    """Raise ValueError where a base is given beside a whole model."""
    check(
        not base,
        f"init_from={base} with out_dir={where}",
        "only an adapter has a base elsewhere",
        "leave one of them out",
    )


def _files_at(where: Path) -> list[Path]:
    """List the files of a model: a .gguf file's parts, or what lies in its folder."""
    if where.is_dir():
        kinds = (".json", ".jinja", ".safetensors", ".gguf")
        return sorted(p for p in where.iterdir() if p.suffix.lower() in kinds)
    return all_parts(where) if where.is_file() and is_gguf(where) else [where]


def _base_run(ckpt: checkpoint.Checkpoint, device: torch.device | str, weights: str) -> Run:
    """Make the run of a checkpoint that holds a whole model."""
    kv = from_dict(KVConfig, ckpt.config["kv"])
    cfg = from_dict(ModelConfig, ckpt.config["model"])
    saved = ckpt.tensors.get("model", {})
    shapes = {name: tuple(t.shape) for name, t in saved.items()}
    check_shapes(cfg, shapes, str(ckpt.path), more=kv.kv in SHARED)
    model = Transformer(cfg)
    if kv.kv in SHARED:
        shared_heads.attach(model, kv, from_dict(MixConfig, ckpt.config.get("mix", {})))
    load_model_state(model, saved, str(ckpt.path))
    place(model, device, getattr(torch, weights))
    return Run(
        model=model.eval(),
        tokenizer=_tokenizer_in(ckpt),
        path=ckpt.path,
        config=ckpt.config,
        adapter=from_dict(AdapterConfig, ckpt.config["adapter"]),
        kv=kv,
        base=str(ckpt.path),
        base_sha256=checkpoint.tensor_hash(ckpt.path),
    )


def _tokenizer_in(ckpt: checkpoint.Checkpoint):
    """Make the tokenizer that a whole model was trained with: of the checkpoint's tokenizer.json,
    where it has one. Raises ValueError where it is another than its config names."""
    name = ckpt.config["tokenizer"]
    if ckpt.definition is None:
        check(
            name in TOKENIZERS,
            f"{ckpt.path} was trained with the tokenizer {name}",
            "no tokenizer.json is kept with it",
            "train it again: newer runs keep theirs",
        )
        return get_tokenizer(name)
    tokenizer = from_definition(ckpt.definition, name.rpartition("-")[0])
    check(
        tokenizer.name == name,
        f"{ckpt.path} was trained with the tokenizer {name}",
        f"its tokenizer.json is that of {tokenizer.name}",
        "restore the folder from a copy",
    )
    take_entry(tokenizer, ckpt.config, f"{ckpt.path}/config.json")
    return tokenizer


def _added_run(
    ckpt: checkpoint.Checkpoint, base: str, device: torch.device | str, options: dict
) -> Run:
    """Make the run of a checkpoint that holds what was added to a base: the one it names, or
    `base`, where that lies now."""
    adapter = from_dict(AdapterConfig, ckpt.config["adapter"])
    kv = from_dict(KVConfig, ckpt.config["kv"])
    select = from_dict(SelectConfig, ckpt.config.get("select", {}))
    saved = {**ckpt.tensors.get("adapter", {}), **ckpt.tensors.get("selector", {})}
    _check_sizes(ckpt.path, adapter, kv, saved)
    below = _load_base(ckpt.path, ckpt.config, base, device, options)
    model = attach_storage(below.model, kv, select)
    lora.attach(model, adapter)
    load_added_state(model, saved)
    kv_router.fold(model)
    return Run(
        model=model.eval(),
        tokenizer=below.tokenizer,
        path=ckpt.path,
        config=ckpt.config,
        adapter=adapter,
        kv=kv,
        base=below.base,
        base_sha256=below.base_sha256,
        select=select,
    )


def _check_sizes(
    path: Path, adapter: AdapterConfig, kv: KVConfig, saved: dict[str, Tensor]
) -> None:
    """Raise ValueError, before anything is allocated, where the sizes that a config gives to what
    was added are not those of its tensors."""
    branches = {"moe_lora": adapter.experts, "routed": adapter.subspaces}
    wanted = {}
    if adapter.adapter != "none":
        wanted["lora_A"] = adapter.r * branches.get(adapter.adapter, 1)
    if kv.recon_hidden and kv.reconstructor == "mlp":
        wanted["reconstructor.up.weight"] = kv.recon_hidden
    for ending, n in wanted.items():
        rows = {len(t) for name, t in saved.items() if name.endswith(f".{ending}")}
        check(
            rows == {n},
            f"{path} does not fit its config: {ending} of another shape",
            f"{n} rows are said, {sorted(rows) or 'none'} are there",
            "use the checkpoint's own config",
        )


def _peft_run(folder: Path, base: str, device: torch.device | str, options: dict) -> Run:
    """Make the run of an adapter that PEFT wrote, on the base it names or on `base`."""
    peft = open_peft(folder)
    where = base or peft.base
    if where.startswith("hf:"):
        where, options = _at_commit(where, options)
        if not base and not options["revision"]:
            options = options | {"revision": peft.revision}
    elif not base and not Path(where).exists():
        # not where the program runs, which is where PEFT looks: perhaps beside the adapter
        where = os.path.normpath(folder / where)
    below = _load_whole(where, f"{folder}", device, options)
    lora.attach(below.model, peft.adapter)
    lora.load_adapter_state(below.model, peft.tensors)
    config = below.config | {
        "stage": "peft",
        "adapter": to_dict(peft.adapter),
        "base": below.base,
        "base_sha256": below.base_sha256,
    }
    return replace(
        below, model=below.model.eval(), path=folder, config=config, adapter=peft.adapter
    )


# ----------------------------------------------------------------------------- which folder


def find_checkpoint(folder: str | os.PathLike) -> Path:
    """Find the checkpoint meant by a folder: itself; of a stage, the best, else the newest valid;
    of a run, that of its first stage routed-s*, else of its only stage, else of pretrain. Raises
    ValueError that says what was found instead."""
    check_model(folder)
    folder = Path(folder)
    _refuse_file(folder)
    if (folder / checkpoint.MANIFEST).is_file():
        return folder
    newest, why = checkpoint.newest(folder)
    if (folder / "best").is_dir() and checkpoint.verify(folder / "best") is None:
        return folder / "best"
    if newest is not None:
        return newest
    stages = sorted(p for p in folder.iterdir() if _is_stage(p))
    stage = _meant_stage(stages)
    if stage is not None:
        return find_checkpoint(stage)
    refuse_pointers(sorted(folder.glob("step-*/*.safetensors")))
    if not stages and not why:
        _refuse_folder(folder)
    names = ", ".join(p.name for p in stages) or "none"
    found = "; ".join(why) or f"stages found: {names}"
    raise ValueError(f"{folder}: no usable checkpoint ({found}); give a stage's folder")


def _refuse_file(path: Path) -> None:
    """Raise ValueError for a file that no model can be read from, and say what it is."""
    if not path.is_file():
        return
    what = "a file, but no .gguf file"
    do = "give a .gguf file, a model's folder or a folder that train.py wrote"
    if path.suffix in PICKLED:
        what = "pickled weights can run code and are not read"
        do = "give the model's folder, with its weights as .safetensors"
    elif path.suffix == ".safetensors":
        what = "weights alone"
        do = "give the folder in which config.json and tokenizer.json lie beside them"
    raise ValueError(f"{path}: {what}; {do}")


def _refuse_folder(folder: Path) -> None:
    """Raise ValueError for a folder that lacks a part of a model, and say which."""
    names = sorted(p.name for p in folder.iterdir())
    check(bool(names), f"{folder}", "an empty folder", "give a model's, or one train.py wrote")
    inside = [name for name in names if is_gguf(Path(name))]
    check(not inside, f"{folder}", f"a folder of {few(inside)}", "give the .gguf file itself")
    there = {Path(name).suffix for name in names}
    settings = read_json(folder / "config.json") if "config.json" in names else {}
    check(
        "train" not in settings,
        f"{folder}",
        "a run of train.py that has no checkpoint yet",
        "wait for its first, or resume it",
    )
    check(
        "config.json" not in names,
        f"{folder}",
        "its config.json names no model_type, and there is no manifest.json of train.py",
        "copy the folder again",
    )
    check(
        ".safetensors" not in there,
        f"{folder}",
        "weights without a config.json",
        "copy the model's config.json and tokenizer.json there",
    )
    check(
        not there & {*PICKLED},
        f"{folder}",
        "pickled weights can run code and are not read",
        "convert them to .safetensors, and copy the model's config.json there",
    )
    check(
        not {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} & {*names},
        f"{folder}",
        "a tokenizer without a model",
        "copy the model's config.json and .safetensors files there",
    )


def _is_stage(path: Path) -> bool:
    """Say whether a folder holds checkpoints."""
    return path.is_dir() and ((path / "best").is_dir() or any(path.glob("step-*")))


def _meant_stage(stages: list[Path]) -> Path | None:
    """Choose among the stages of a run, in order of their names."""
    routed = [s for s in stages if s.name.startswith("routed-s")]
    if routed:
        return routed[0]
    if len(stages) == 1:
        return stages[0]
    return next((s for s in stages if s.name == "pretrain"), None)


def base_reference(run: Run, folder: Path) -> str:
    """Say how an adapter in folder/step-* names its base: one of our checkpoints by relative path,
    a model's files by absolute path."""
    if (run.path / checkpoint.MANIFEST).is_file():
        return os.path.relpath(run.path.resolve(), (folder / "x").resolve())
    return run.base


def _load_base(
    path: Path, config: dict, moved: str, device: torch.device | str, options: dict
) -> Run:
    """Load the base that the adapter in `path` belongs to, from where its config says or from
    `moved`; its weights must be the same."""
    where = moved or config["base"]
    if where.startswith("hf:"):
        where, options = _at_commit(where, options)
    elif moved:
        check_model(moved)
    elif not os.path.isabs(where):
        where = os.path.normpath(path / where)
    run = _load_whole(where, f"{path}", device, options)
    check(
        run.base_sha256 == config["base_sha256"],
        f"{where}: the weights have sha256 {run.base_sha256[:12]}...",
        f"{path} was trained on {config['base_sha256'][:12]}...",
        "give the base it was trained on",
    )
    return run


def _is_adapter(where: str) -> bool:
    """Say whether what lies there belongs on a base; what cannot be read is not said to."""
    if is_peft(where) or is_foreign(where):
        return is_peft(where)
    try:
        return "base" in read_json(find_checkpoint(where) / "config.json")
    except ValueError:
        return False  # load_run says why


def _at_commit(where: str, options: dict) -> tuple[str, dict]:
    """Split hf:ORG/NAME@COMMIT into the name and the options with that revision, if it has one."""
    name, _, commit = where.partition("@")
    return name, options | {"revision": commit or options["revision"]}


def _load_whole(where: str, adapter: str, device: torch.device | str, options: dict) -> Run:
    """Load the base of the adapter that lies at `adapter`. ValueError where it is not there, or is
    an adapter itself."""
    if where.startswith("hf:"):
        return load_pretrained(where, device, **options)
    check(
        Path(where).exists(),
        f"{adapter} adapts {where}",
        "that is gone",
        "move base and adapter together, or say where it is with --init_from",
    )
    check(
        not _is_adapter(where),
        f"{adapter} adapts {where}",
        "that is an adapter itself",
        "say where its base is with --init_from",
    )
    return load_run(where, device, **options)


# ----------------------------------------------------------------------------- what was added


def attach_storage(
    model: Transformer,
    kv: KVConfig,
    select: SelectConfig,
    batches: list[Tensor] | None = None,
    seed: int = 0,
) -> Transformer:
    """Give a model the KV paths of `kv`, in place: value groups, selecting ones, or none. Returns
    the model."""
    check_not_shared(kv.kv)
    if kv.kv == "select":
        return selector.attach(model, kv, select, batches, seed)
    return kv_router.attach(model, kv, batches, seed)


def added_state(model: Transformer) -> dict[str, Tensor]:
    """Return everything that was added to a base: adapters, value routers, reconstructors, bases,
    the selector."""
    return {**lora.adapter_state(model), **kv_router.state(model), **selector.state(model)}


def split_added(
    saved: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Split an added_state into what belongs to value groups, to the selector, and to adapters."""
    groups = {k: t for k, t in saved.items() if ".kv_path." in k}
    chosen = {k: t for k, t in saved.items() if k.startswith("selector.")}
    adapters = {k: t for k, t in saved.items() if k not in groups and k not in chosen}
    return groups, chosen, adapters


def load_added_state(model: Transformer, saved: dict[str, Tensor]) -> None:
    """Put added_state back into a model with the same things attached, not folded yet (ValueError
    lists what does not fit)."""
    groups, chosen, adapters = split_added(saved)
    kv_router.load_state(model, groups)
    selector.load_state(model, chosen)
    lora.load_adapter_state(model, adapters)


# ----------------------------------------------------------------------------- models of others


def is_foreign(where: str | os.PathLike) -> bool:
    """Say whether another project wrote it: hf:ORG/NAME, a .gguf file, a folder with a config.json
    that names a model_type and no manifest of ours."""
    path = Path(where)
    if str(where).startswith("hf:") or is_gguf(path):
        return True
    config = path / "config.json"
    if not config.is_file() or (path / checkpoint.MANIFEST).exists() or is_peft(path):
        return False
    return "model_type" in read_json(config)


def load_pretrained(
    where: str | os.PathLike,
    device: torch.device | str = "cpu",
    weights: str = "float32",
    revision: str = "",
    folder: Path | None = None,
) -> Run:
    """Load a model and its tokenizer from a Hugging Face folder, a .gguf file or hf:ORG/NAME.

    weights: float32 or bfloat16, the dtype the weights are held in; revision: branch, tag or commit
    of an hf: model; folder: where that has been downloaded to. Raises ValueError, one line, naming
    what is missing or not supported."""
    text = str(where)
    from_hub = text.startswith("hf:")
    path = Path(text)
    if from_hub:
        path = folder or hub_folder(text[3:], revision)
    check(
        not is_peft(path),
        text,
        "an adapter, not a model",
        "give the model that it adapts",
    )
    files = open_gguf(path) if is_gguf(path) else open_folder(path)
    if from_hub:
        name = text[3:].replace("/", "-")
        base = f"{text}@{path.name}"
    else:
        name = files.name
        base = str(path.resolve())
    cfg = model_config(files.config, text)
    tokenizer = _tokenizer_of(files, name, cfg, text)
    take_chat(tokenizer, files.chat or folder_chat(path, files.definition))
    cfg = with_own_head(cfg, files)
    model = build_model(cfg, files, torch.device(device), getattr(torch, weights))
    adapter = AdapterConfig(adapter="none")
    kv = KVConfig(kv="dense")
    config = {
        "stage": "pretrained",
        "model": to_dict(cfg),
        "tokenizer": tokenizer.name,
        "adapter": to_dict(adapter),
        "kv": to_file(kv),
    }
    return Run(
        model=model.eval(),
        tokenizer=tokenizer,
        path=path,
        config=config,
        adapter=adapter,
        kv=kv,
        base=base,
        base_sha256=weights_hash(files.weights),
    )


def _tokenizer_of(files: ModelFiles, name: str, cfg: ModelConfig, where: str):
    """Make the tokenizer that came with a model's files. Raises ValueError where there is none, or
    one with more ids than the model has."""
    check(
        files.definition is not None,
        where,
        "no tokenizer.json in it",
        "copy the model's tokenizer.json there",
    )
    tokenizer = from_definition(files.definition, name)
    check(
        tokenizer.vocab_size <= cfg.vocab_size,
        f"{where}: a tokenizer of {tokenizer.vocab_size} ids",
        f"the model has {cfg.vocab_size}",
        "use the model's own tokenizer.json",
    )
    return tokenizer
