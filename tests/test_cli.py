"""Flags given wrong at the command line: each is answered by one line, exit code 2, and nothing is
left behind."""

import dataclasses

import pytest
from commands import (
    CALLED,
    NEEDED,
    PROGRAMS,
    both,
    complaint,
    here,  # noqa: F401 (fixtures)
    process,
    tree,
)

import cli
import train
from settings import stages
from settings.train import READ_OF

PRETRAIN = ["--stage=pretrain"]
ADAPT = ["--stage=adapt", "--init_from=x"]
SELECT = ["--stage=select", "--init_from=x"]
CONTINUE = ["--stage=continue", "--init_from=x"]
STORED_CONTEXT = [
    "--stage=adapt",
    "--init_from=x",
    "--kv=select",
    "--kv_from=x",
    "--adapter=lora",
    "--objective=distill",
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_defaults_exist_once(name):
    """Without flags, parse_args gives the dataclasses' own defaults; no field is defined twice,
    each has type, default and help."""
    configs = PROGRAMS[name][1]
    args = cli.parse_args(configs, NEEDED[name])
    for key, cls in configs.items():
        first = key == next(iter(configs))  # the group of the program's own flags
        assert getattr(args, key) == cls(
            **(dict(f[2:].split("=") for f in NEEDED[name]) if first else {})
        )
        assert all(
            f.metadata["help"] and str(f.type) in ("int", "float", "str", "bool")
            for f in dataclasses.fields(cls)
        )
    assert args.given == {n.split("=")[0][2:] for n in NEEDED[name]}


def test_both_syntaxes_give_the_same(here):
    """--key=value and --key value are one thing, for each type; a bare boolean means true; negative
    and last values are read."""
    for flags in (
        [["--n_layer=3"], ["--n_layer", "3"]],
        [["--adapt_lr=1e-3"], ["--adapt_lr", "1e-3"]],
        [["--dataset=pycode"], ["--dataset", "pycode"]],
        [["--compile"], ["--compile=true"], ["--compile", "yes"], ["--compile=0", "--compile=1"]],
    ):
        parsed = [cli.parse_args(train.CONFIGS, f) for f in flags]
        assert all(p == parsed[0] for p in parsed[1:]) and parsed[0] != cli.parse_args(
            train.CONFIGS, []
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_unknown_flag_is_answered_by_the_nearest(name, capsys, here):
    """A misspelt flag gets the nearest real one; foreign flags, in both syntaxes and mixed with
    good ones, are refused."""
    typos = {
        "train": ("n_layr", "n_layer"),
        "eval": ("budget", "budgets"),
        "sample": ("temprature", "temperature"),
        "export": ("init_form", "init_from"),
    }
    wrong, right = typos[name]
    for flags in both(wrong, 3):
        assert f"unknown flag --{wrong}: did you mean --{right}?" in complaint(
            capsys, name, *NEEDED[name], *flags
        )
    for foreign in ("--xyzzy", "--wandb_log", "--lang=en"):  # like none of ours
        said = complaint(capsys, name, *NEEDED[name], foreign)
        assert f"unknown flag {foreign.split('=')[0]}: --help --all lists all flags" in said
    assert "unexpected argument 'config/a.py'" in complaint(
        capsys, name, *NEEDED[name], "config/a.py"
    )
    assert complaint(capsys, name, *NEEDED[name], "--two\nlines=1\n2")
    assert tree(here) == {}


@pytest.mark.parametrize("name", PROGRAMS)
def test_wrong_flag_of_a_process(name, here):
    """True processes: one line, exit 2, before torch is loaded, nothing left behind."""
    wrong = {
        "train": ["--seed", "many"],
        "eval": ["--sequences", "many"],
        "sample": ["--top_k", "many"],
        "export": ["--weights", "int8"],
    }[name]
    for flags in (["--no_such_flag=1"], wrong, ["--revision=main", "--init_from=x"]):
        code, out, err, seconds = process(name, *NEEDED[name], *flags, cwd=here)
        assert (
            (code, out, err.count("\n")) == (2, "", 1)
            and err.startswith(f"{CALLED[name]}: ")
            and seconds < 3
        ), err
    assert tree(here) == {}


def every_field(kinds: tuple[str, ...]) -> list:
    return [
        pytest.param(name, f, id=f"{name}-{f.name}")
        for name, (_, configs) in PROGRAMS.items()
        for cls in configs.values()
        for f in dataclasses.fields(cls)
        if str(f.type) in kinds
    ]


@pytest.mark.parametrize("name, f", every_field(("int", "float", "bool")))
def test_wrong_type(name, f, capsys):
    """Words, empty text, NaN, infinity and, for integers, fractions are refused for every number
    and boolean, in both syntaxes."""
    for value in {
        "int": ("two", "1.5", "", "nan"),
        "float": ("two", "", "nan", "inf"),
        "bool": ("maybe", "2"),
    }[str(f.type)]:
        for flags in both(f.name, value):
            line = complaint(capsys, name, *NEEDED[name], *flags)
            assert f"--{f.name}" in line and repr(value) in line


OUT_OF_RANGE = {  # every numeric field, and values just outside its range
    "vocab_size": [0],
    "block_size": [0, -1, 10**12],
    "n_layer": [0],
    "n_embd": [0],
    "n_head": [0],
    "n_kv_head": [0, 3],
    "head_dim": [0, 15],
    "n_inner": [0],
    "rope_theta": [0, -1],
    "norm_eps": [0, -1],
    "r": [-1],
    "alpha": [-1],
    "lora_dropout": [-0.1, 1],
    "subspaces": [0, 3],
    "subspace_topk": [0, 9],
    "experts": [0, 1],
    "expert_topk": [0, 5],
    "balance_weight": [-0.1],
    "n_groups": [0, 1, 3, 128],
    "topk_groups": [0, 5],
    "recon_hidden": [-1],
    "aux_weight": [-0.1],
    "kv_warmup": [-0.1, 1.1],
    "kv_tail": [-1],
    "kv_tail_block": [0],
    "val_fraction": [0, 1],
    "context": [0, 1],
    "seed": [-1, 2**32],
    "seeds": [0, 10**7],
    "max_minutes": [0],
    "pretrain_steps": [0],
    "adapt_steps": [0],
    "pretrain_batch_size": [0],
    "adapt_batch_size": [0],
    "accumulation": [0],
    "select_steps": [0],
    "select_batch_size": [0],
    "select_lr": [0, -1],
    "kv_keep": [-0.1, 1.1],
    "token_keep": [0, 1.1],
    "value_keep": [0, 1.1],
    "hedge": [-0.1, 1.1],
    "refit_ridge": [0, -0.1],
    "sinks": [-1],
    "ahead": [-1],
    "pool": [0, 4],
    "past": [0],
    "readers": [0],
    "observers": [-1],
    "recall": [-0.1, 1.1],
    "shortest": [-1],
    "pretrain_lr": [0, -1],
    "adapt_lr": [0, -1],
    "warmup": [-0.1, 1.1],
    "weight_decay": [-0.1],
    "beta1": [-0.1, 1],
    "beta2": [-0.1, 1],
    "distill_lr": [0, -1],
    "distill_steps": [-1],
    "rope_factor": [0.5],
    "rope_low_freq": [0, 4],
    "rope_high_freq": [1],
    "rope_original": [0],
    "rope_attention": [0, -1],
    "embedding_scale": [0, -1],
    "query_scale": [-1],
    "attention_cap": [-1],
    "logit_cap": [-1],
    "sliding_window": [-1],
    "global_every": [0],
    "rope_local_theta": [-1],
    "test_sequences": [0],
    "calibration": [0],
    "query": [-1],
    "continuation": [1, -1],
    "distractors": [-1, 32],
    "chains": [0, 101],
    "hops": [0, 101],
    "answer_tokens": [0],
    "needles": [0, 33],
    "quest_whole": [-1],
    "shots": [-1, 101],
    "grad_clip": [-1],
    "eval_interval": [-1],
    "eval_sequences": [0],
    "sample_interval": [-1],
    "save_interval": [0],
    "keep_checkpoints": [0],
    "sequences": [0],
    "batch_size": [0],
    "max_new_tokens": [0],
    "num_samples": [0],
    "temperature": [-0.1],
    "top_k": [-1],
    "top_p": [0, 1.1],
    "key_bits": [0, 5],
    "value_bits": [1, 5],
    "key_block": [-1, 48],
    "kv_sinks": [-2],
    "kv_bytes": [-0.1, 1.1],
    "prefill_tokens": [-1],
    "consistency_weight": [-0.1],
    "expert_groups": [-1],
    "kv_share": [0, 1.1],
    "steps": [0],
    "lr": [0, -1],
}


@pytest.mark.parametrize("name, f", every_field(("int", "float")))
def test_out_of_range(name, f, capsys, here):
    """Every numeric field, without exception, refuses what lies outside its range and names itself
    and the value."""
    values = {"block_size": [-1]}.get(f.name) if name == "eval" else None  # 0: the model's context
    for value in values or OUT_OF_RANGE[f.name]:
        for flags in both(f.name, value):
            line = complaint(capsys, name, *NEEDED[name], *flags)
            assert (
                f"{f.name}={value}"
                in line.replace(".0 ", " ").replace(".0:", ":").replace(".0,", ",")
                and ";" in line
            ), line
    assert tree(here) == {}


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--stage=finetune"], "stage='finetune'"),
        (["--adapter=dora"], "one of none, lora"),
        (["--kv=int4"], "one of dense, value_groups"),
        (["--lora_targets=q,z"], "lora_targets='q,z'"),
        (["--lora_targets="], "a list of q,k,v"),
        (["--value_basis=svd"], "native, random"),
        (["--reconstructor=linear"], "one of zero, mlp, keys"),
        (["--kv_layers=2,x"], "kv_layers='2,x'"),
        (["--kv_layers=deepest:0"], "(0, 1]"),
        (["--kv_layers=deepest:1.5"], "(0, 1]"),
        (["--kv_layers="], "kv_layers=''"),
        (["--kv_layers=-1"], "layers are"),
        (["--dataset=imagenet"], "text:PATH"),
        (["--dataset=text:"], "text:PATH"),
        (["--adapt_dataset=x"], "text:PATH"),
        (["--tokenizer=bpe"], "byte, gpt2"),
        (["--init_from=x", "--stage=pretrain"], "give --stage=adapt or all"),
        (["--init_from="], "an empty init_from"),
        (["--revision=v1"], "only models of the hub have revisions"),
        (["--revision=v1", "--init_from=some/folder"], "give --init_from=hf:ORG/NAME"),
        (["--weights=float16"], "one of float32, bfloat16"),
        (
            ["--weights=bfloat16", "--dtype=float32", "--stage=adapt", "--init_from=x"],
            "they need computing in bfloat16",
        ),
        (["--weights=bfloat16", "--stage=adapt", "--init_from=x"], "give --dtype=bfloat16"),
        (["--weights=bfloat16"], "there is no base whose weights are held"),
        (["--objective=mse"], "objective='mse'"),
        (["--objective=distill"], "distill_steps=N"),
        (["--objective=distill", "--stage=pretrain"], "stage=pretrain"),
        (["--test_dataset=c4"], "test_dataset='c4'"),
        (["--test_dataset=text:missing.txt"], "no such file"),
        (["--distill_steps=3"], "give --learn_basis"),
        (["--distill_steps=3", "--learn_basis", "--stage=pretrain"], "give --stage=all"),
        (["--kv_from=x"], "one stage starts from it"),
        (["--stage=adapt", "--init_from=no.gguf"], "no.gguf"),
        (["--stage=adapt", "--init_from=hf:name"], "hf:ORG/NAME"),
        (["--detokenize=perhaps"], "neither true nor false"),
        (["--resume"], "resume without out_dir"),
        (["--init_from=x"], "no such folder"),
        (["--dtype=float64"], "dtype='float64'"),
        (["--preset=big"], "preset='big'"),
        (["--topk_groups=3", "--n_groups=2"], "1 <= K <= S"),
        (["--n_head=6", "--n_kv_head=4"], "divide the query heads"),
        (["--n_layer"], "expected one argument"),
        (["--stage=adapt"], "init_from=scratch"),
        (["--device=cuda:99"], "device='cuda:99'"),
        (["--device=tpu"], "device='tpu'"),
        (["--device=meta"], "device='meta'"),
        (["--head_dim=6", "--n_groups=4"], "S must divide D"),
        (["--n_groups=16", "--head_dim=8"], "S must divide D"),
        (["--kv_layers=7"], "layers are 0..3"),
        (["--stage=adapt", "--init_from=no/where"], "no such folder"),
        (["--stage=adapt", "--init_from=."], "no usable checkpoint"),
        (["--resume", "--out_dir=nowhere"], "there is no checkpoint in it"),
        (["--resume", "--out_dir=."], "there is no checkpoint in it"),
        (["--resume", "--out_dir=nowhere", "--stage=adapt"], "resume from nowhere: there is no"),
        (["--resume", "--out_dir=nowhere", "--adapter=lora"], "resume from nowhere: there is no"),
        (["--dataset=text:missing.txt"], "no such file"),
        (["--adapt_dataset=text:missing.txt"], "no such file"),
        (["--stage=select"], "init_from=scratch"),
        (["--stage=select", "--init_from=no/where"], "no such folder"),
        (["--kv=select"], "give --stage=select"),
        (["--kv=select", "--stage=adapt", "--init_from=x"], "give --kv_from=RUN"),
        ([*STORED_CONTEXT, "--objective=lm"], "objective=lm with kv=select"),
        ([*STORED_CONTEXT, "--adapter=none"], "adapter=none with kv=select"),
        ([*STORED_CONTEXT, "--compile"], "compile with kv=select"),
        ([*STORED_CONTEXT, "--shard"], "shard with kv=select"),
        ([*STORED_CONTEXT, "--kv_byte_budgets=0.1,1"], "a list of shares above 0 and below 1"),
        ([*STORED_CONTEXT, "--kv_byte_budgets="], "a list of shares above 0 and below 1"),
        ([*STORED_CONTEXT, "--context=1"], "context=1"),
        (["--stage=adapt", "--init_from=x", "--context=0.5"], "or give --kv=select"),
        (
            ["--stage=select", "--init_from=x", "--objective=distill"],
            "objective=distill with stage=select",
        ),
        (
            ["--stage=select", "--init_from=x", "--adapter=lora", "--compile"],
            "compile, adapter with stage=select",
        ),
        (
            ["--stage=select", "--init_from=x", "--kv=dense"],
            "kv=dense with stage=select: it stores by select",
        ),
        (
            ["--stage=select", "--init_from=x", "--learn_basis"],
            "learn_basis with stage=select",
        ),
        (["--stage=pretrain", "--n_groups=8"], "n_groups with stage=pretrain"),
        (["--stage=pretrain", "--seeds=2", "--r=3"], "seeds, r with stage=pretrain"),
        (["--vocab_size=300"], "the byte tokenizer sets it"),
        (["--stage=pretrain", "--weights=bfloat16"], "weights with stage=pretrain"),
        (["--adapter=routed"], "adapter with stage=all"),
        (["--distill_lr=0.1"], "give --distill_steps=N"),
        (
            ["--stage=adapt", "--init_from=x", "--adapter=lora", "--experts=3"],
            "experts with adapter=lora: it is not read then; leave it out, or give "
            "--adapter=moe_lora",
        ),
        (
            ["--stage=adapt", "--init_from=x", "--adapter=lora", "--n_groups=8"],
            "n_groups with kv=dense: it is not read then; leave it out, or give --kv=value_groups",
        ),
        (["--recon_hidden=9"], "or give --reconstructor=mlp"),
        ([*PRETRAIN, "--rope_scaling=linear"], "give a --rope_factor of more than 1"),
        (
            [*PRETRAIN, "--rope_factor=2", "--rope_scaling=linear", "--rope_original=9"],
            "or give --rope_scaling=llama3",
        ),
        ([*PRETRAIN, "--global_every=3"], "global_every with sliding_window=0"),
        ([*PRETRAIN, "--positions=learned", "--rope_theta=9"], "rope_theta with positions=learned"),
        ([*ADAPT, "--key_block=32"], "leave it out, or give --key_bits=8 --value_bits=8"),
        ([*ADAPT, "--kv_sinks=2"], "kv_sinks with key_bits=16: it is not read then"),
        ([*SELECT, "--kv_bytes=0.1", "--key_bits=16"], "key_bits with kv_bytes=0.1: it is not rea"),
        ([*CONTINUE, "--key_block=32"], "key_block with stage=continue"),
        ([*CONTINUE, "--kv_sinks=2"], "kv_sinks with stage=continue"),
        ([*CONTINUE, "--kv_tail_block=1"], "kv_tail_block with stage=continue"),
        ([*CONTINUE, "--key_bits=8", "--value_bits=8"], "key_bits, value_bits with stage=continue"),
        (["--key_block=32"], "key_block with key_bits=16: it is not read then"),
        (["--init_from=x", "--dataset=pydocs", "--adapt_dataset=pycode"], "dataset with init_from"),
        ([*PRETRAIN, "--dataset=pydocs", "--detokenize"], "detokenize with pydocs: it is read of"),
        ([*PRETRAIN, "--template=chat"], "template with pydocs: it is read of instruct:PATH alone"),
        ([*ADAPT, "--text_field=body"], "text_field with pycode: it is read of text:PATH alone"),
        ([*ADAPT, "--adapter=lora", "--prefill=routed"], "prefill with kv=dense"),
        (
            [*ADAPT, "--adapter=lora", "--key_bits=8", "--value_bits=8"],
            "key_bits, value_bits with kv",
        ),
        ([*ADAPT, "--adapter=lora", "--kv_tail_block=4"], "kv_tail_block with kv=dense"),
        ([*ADAPT, "--adapter=lora", "--lm_to_router"], "lm_to_router with kv=dense"),
        ([*ADAPT, "--aux_weight=0.5"], "aux_weight with value_router=norm: it is not"),
        ([*ADAPT, "--dataset=pydocs", "--adapt_dataset=pycode"], "dataset with adapt_dataset"),
        (["--adapt_lr=0.1", "--adapt_rates=0.1,0.2"], "adapt_lr with adapt_rates=0.1,0.2"),
        (["--seeds=1", "--max_minutes=9"], "give a --seeds of more than 1"),
        (
            [*SELECT, "--predictors=predictor_query", "--predictor_loss=kl"],
            "predictor_loss with predictors=predictor_query",
        ),
        ([*CONTINUE, "--n_groups=8"], "n_groups with expert_groups=0"),
        ([*CONTINUE, "--learn_basis"], "learn_basis with stage=continue"),
        ([*CONTINUE, "--expert_router=random", "--lm_to_experts"], "give --expert_router=learned"),
        (
            ["--stage=select", "--init_from=x", "--predictors=observed"],
            "predictor, expected_attention, predictor_query",
        ),
        (["--relevance=quest"], "relevance='quest'"),
        (["--token_relevance=norm"], "token_relevance='norm'"),
        (["--allocation=token"], "head, layer, global"),
        (["--predictor_loss=ce"], "one of mse, kl"),
        (["--kv_keep=0.5", "--fixed_k"], "give --token_keep"),
        (["--kv_keep=0.5", "--token_relevance=h2o"], "give --token_keep"),
        (["--kv=select", "--reconstructor=mlp"], "leave both out"),
        (["--kv=select", "--value_router=linear"], "leave both out"),
        (["--mask_scope=shared"], "or --kv=select"),
        (["--out_dir=/dev/null"], "is a file"),
        (["--out_dir=/dev/null/x"], "dev/null"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_train_refuses(flags, why, capsys, here):
    """Choices, combinations, devices, folders and corpora that cannot be: said in one line, and no
    folder appears, out/ included."""
    assert why in complaint(capsys, "train", *flags)
    assert tree(here) == {}


STAGES = {
    "all": [],
    "pretrain": ["--stage=pretrain"],
    "adapt": ["--stage=adapt", "--init_from=x"],
    "select": ["--stage=select", "--init_from=x"],
    "continue": ["--stage=continue", "--init_from=x"],
}


# Refused by what several others are, not by one.
BESIDE = ("distill_lr", "aux_weight", "lm_to_router", "predictor_loss", "weights", *READ_OF)


@pytest.mark.parametrize("stage", STAGES)
def test_unread_flags_are_refused_by_name(stage, capsys):
    """Every flag, given its default, is either accepted by a stage or refused by its name; every
    flag is accepted by some stage, and a lone --stage is accepted."""
    refused = []
    for group, cls in train.CONFIGS.items():
        for f in dataclasses.fields(cls):
            if f.name in ("stage", "init_from", "resume", "kv", "vocab_size", "revision"):
                continue
            args = cli.parse_args(train.CONFIGS, [*STAGES[stage], f"--{f.name}={f.default}"])
            if not stages.is_read(stage, group, f.name):
                with pytest.raises(ValueError, match=f"^{f.name} with stage={stage}: "):
                    stages.check_flags(args)
                refused.append(f.name)
                continue
            try:
                stages.check_flags(args)
            except ValueError as e:  # read, but not with what else is the default
                assert f.name in stages.READ_WITH or f.name in BESIDE, e
                assert str(e).startswith(f.name), e
            assert any(stages.is_read(s, group, f.name) for s in STAGES)
    assert len(refused) > 20
    stages.check_flags(cli.parse_args(train.CONFIGS, STAGES[stage]))


@pytest.mark.parametrize(
    "flags",
    [
        [*CONTINUE, "--kv=gqa", "--align_heads=false"],
        [*CONTINUE, "--expert_groups=2", "--n_groups=8"],
        [*PRETRAIN, "--rope_factor=2", "--rope_scaling=yarn", "--rope_original=9"],
        [*PRETRAIN, "--sliding_window=9", "--global_every=3"],
        [*ADAPT, "--rope_scaling=linear"],  # of the base, which is not known yet
        [*ADAPT, "--dataset=instruct:x", "--template=chat"],
        [*ADAPT, "--reconstructor=keys", "--aux_weight=0.5"],
        [*ADAPT, "--reconstructor=keys", "--kv_sinks=2"],
        [*ADAPT, "--key_bits=8", "--value_bits=8", "--kv_sinks=2", "--key_block=32"],
        [*SELECT, "--key_bits=16", "--value_bits=16"],
        [*SELECT, "--key_bits=8", "--value_bits=8", "--kv_bytes=0.1"],
        [*SELECT, "--kv_sinks=2", "--key_block=32"],  # of budgets of bytes that are measured later
        ["--dataset=pydocs", "--adapt_dataset=text:x", "--text_field=body", "--detokenize"],
    ],
    ids=lambda flags: flags[-1],
)
def test_flags_that_are_read_together_are_accepted(flags):
    """What is refused beside some flags is accepted beside those with which it is read."""
    stages.check_flags(cli.parse_args(train.CONFIGS, flags))


def test_table_of_stages_names_settings():
    """Every name in the table of what stages read is a setting, each once."""
    known = {f.name for cls in train.CONFIGS.values() for f in dataclasses.fields(cls)}
    for reads in stages.READS.values():
        names = [*reads.besides, *reads.never]
        assert {*names} <= known and len({*names}) == len(names)
        assert {*reads.groups} <= {*train.CONFIGS}
    assert {*stages.READ_WITH} <= known and set(stages.GROUPS) == set(train.CONFIGS)


def test_lora_alone_adapts_over_whole_values():
    """--stage=adapt --adapter=lora stores whole values unless --kv is given; other adapters and
    other stages keep the default."""

    def stored(*flags) -> str:
        return cli.parse_args(train.CONFIGS, ["--init_from=x", *flags]).kv.kv

    assert stored("--stage=adapt", "--adapter=lora") == "dense"
    assert stored("--stage=adapt", "--adapter=lora", "--kv=value_groups") == "value_groups"
    assert stored("--stage=adapt", "--adapter=routed") == "value_groups"
    assert stored("--stage=adapt") == stored() == "value_groups"


def test_a_pretrained_model_is_adapted_at_a_rate_of_its_own(tmp_path):
    """Without --adapt_lr a model of another project is trained at 1e-3, all of its weights at 1e-4;
    one of ours, and what somebody or a preset says, stays as it is."""

    def rate(*flags) -> float:
        return cli.parse_args(train.CONFIGS, [*flags]).train.adapt_lr

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text('{"train": {}}')
    for where in ("hf:a/b", "x.GGUF", tmp_path):
        assert rate(f"--init_from={where}") == rate(f"--init_from={where}", "--stage=adapt") == 1e-3
        assert rate(f"--init_from={where}", "--stage=continue") == 1e-4
        assert rate(f"--init_from={where}", "--adapt_lr=0.5", "--stage=continue") == 0.5
        assert rate(f"--init_from={where}", "--preset=paper") == 5e-4
    assert rate(f"--init_from={ours}") == rate("--init_from=missing") == rate() == 5e-3


@pytest.mark.parametrize(
    "flags, why",
    [
        ([], "no out_dir"),
        (["--budgets=0"], "(0, 1]"),
        (["--budgets=0.5,1.01"], "(0, 1]"),
        (["--budgets=-0.5"], "(0, 1]"),
        (["--budgets=half"], "(0, 1]"),
        (["--budgets=nan"], "(0, 1]"),
        (["--budgets=1/0"], "(0, 1]"),
        (["--methods=h2o"], "dense, value_groups"),
        (["--tasks="], "name one at least"),
        (["--split=half"], "val, train, test"),
        (["--bases=svd"], "native, random"),
        (["--groups=3"], "a list of 2, 4, 8, 16"),
        (["--groups=4,x"], "groups='4,x'"),
        (["--calibrate=c4"], "calibrate='c4'"),
        (["--revision=v1"], "only models of the hub"),
        (["--weights=bfloat16", "--dtype=float32"], "they need computing in bfloat16"),
        (["--weights=bfloat16"], "give --dtype=bfloat16"),
        (["--weights=int8"], "one of float32, bfloat16"),
        (["--init_from="], "an empty init_from"),
        (["--tasks=haystack"], "perplexity"),
        (["--dataset=c4"], "text:PATH"),
        (["--tasks=needle,multiple_choice"], "give --questions=PATH"),
        (["--shots_from=dev"], "give --questions=PATH"),
        (["--kv_budgets=0"], "(0, 1]"),
        (["--kv_budgets=0.5,2"], "(0, 1]"),
        (["--token_budgets=0.5,x"], "(0, 1]"),
        (["--relevances=h2o"], "relevances='h2o'"),
        (["--token_relevances=norm"], "quest, h2o, streaming, snapkv"),
        (["--splits=-1"], "a list of layers"),
        (["--splits=0,x"], "a list of layers"),
        (["--tasks=needle_reuse"], "give --distractors"),
        (["--methods=select,snapkv"], "dense, value_groups, select"),
        (["--dtype=int8"], "dtype='int8'"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) and v else "",
)
def test_eval_refuses(flags, why, capsys, here):
    """Budgets outside (0, 1], unknown methods, tasks and corpora, and no folder."""
    assert why in complaint(
        capsys, "eval", "--device=cpu", *(["--out_dir=x"] if flags else []), *flags
    )
    assert tree(here) == {}


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--to="], "no folder to export to"),
        (["--to=x"], "no out_dir"),
        (["--to=x", "--init_from=no/where"], "no such folder"),
        (["--to=x", "--out_dir=no/where"], "no such folder"),
        (["--to=x", "--revision=v1"], "only models of the hub"),
    ],
    ids=lambda v: v[-1] if v else "",
)
def test_export_refuses(flags, why, capsys, here):
    """No folder to write to, no model to export."""
    assert why in complaint(capsys, "export", *flags)
    assert tree(here) == {}
