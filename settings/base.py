"""Which pretrained model is adapted, measured or exported."""

from __future__ import annotations

from dataclasses import dataclass

from settings.fields import check, check_fields, opt


@dataclass(frozen=True)
class BaseConfig:
    """The pretrained model that is adapted, measured or exported."""

    init_from: str = opt(
        "scratch",
        "a Hugging Face folder, a .gguf file, hf:ORG/NAME, an adapter that PEFT wrote, or a run "
        "that train.py left; with --out_dir of an adapter: where its base lies now; scratch: none",
    )
    revision: str = opt("", "branch, tag or commit of an hf: model; empty: main")
    weights: str = opt(
        "float32",
        "dtype in which a base's weights are held (bfloat16 needs computing in bfloat16)",
        ("float32", "bfloat16"),
    )

    def __post_init__(self):
        check_fields(self)
        check(
            bool(self.init_from),
            "an empty init_from",
            "scratch or a place",
            "leave --init_from out or give a path",
        )
        check(
            not self.revision or self.init_from.startswith("hf:"),
            f"revision={self.revision!r} with init_from={self.init_from!r}",
            "only models of the hub have revisions",
            "give --init_from=hf:ORG/NAME",
        )

    def place(self, out_dir: str) -> str:
        """Return the folder or model that is meant. ValueError where neither is given."""
        check(
            bool(out_dir) or self.init_from != "scratch",
            "no out_dir",
            "a trained run or a pretrained model is needed",
            "give --out_dir=DIR or --init_from=PATH",
        )
        return out_dir or self.init_from

    def options(self, out_dir: str) -> dict:
        """Return the keyword arguments of loaders.runs.load_run for place(out_dir)."""
        moved = self.init_from if out_dir and self.init_from != "scratch" else ""
        return dict(base=moved, weights=self.weights, revision=self.revision)
