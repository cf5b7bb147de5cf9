"""Value-group routing: bases, routers, reconstructors and the KV path, masked and packed, against
loops and float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import (
    PAPER_LIKE,
    TINY,
    brute_force_path,
    coordinates,
    grouped_model,
    qkv,
    random_path,
    randomise,
    read_in_pieces,
    routed_value,
    tiny_model,
    tokens,
)

import kv_router
import lora
from config import KVConfig
from reconstruct import fit_router, straight_through
from report.rows import filled_cache, kept_shares
from routing.bases import value_basis
from settings.adapters import AdapterConfig
from storage.as_dense import as_dense
from storage.cache import NewTokens
from storage.dense import DenseCache
from storage.layout import expand_mask, top_k_mask
from storage.packed import packed_count
from tasks import text as tasks


def setting(S, K, basis, reconstructor, router, scope, **more) -> dict:
    """Settings of value groups, by name."""
    return dict(
        n_groups=S,
        topk_groups=K,
        value_basis=basis,
        reconstructor=reconstructor,
        value_router=router,
        mask_scope=scope,
        **more,
    )


SETTINGS = [  # every basis, reconstructor, router, scope, S and tail at least once, in few models
    setting(4, 2, "output", "zero", "linear", "layer"),
    setting(4, 2, "native", "mlp", "linear", "head"),
    setting(8, 3, "pca", "mlp", "norm", "head"),
    setting(16, 5, "random", "mlp", "linear", "layer"),
    setting(16, 9, "output", "zero", "norm", "head"),
    setting(2, 1, "output", "mlp", "norm", "layer"),
    setting(4, 3, "pca", "mlp", "norm", "layer", kv_tail=3),
    setting(4, 1, "native", "mlp", "linear", "head", kv_tail=2, kv_tail_block=5),
    setting(4, 2, "output", "zero", "norm", "head", kv_tail=3, learn_basis=True),
    setting(8, 3, "pca", "mlp", "linear", "layer", learn_basis=True),
    # no tail, but tokens wait in it until their block is full
    setting(4, 2, "output", "zero", "norm", "head", kv_tail=0, kv_tail_block=4),
]


def name(s: dict) -> str:
    return "-".join(str(v) for v in s.values())


each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=name)
each_learned = pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if "learn_basis" in s], ids=name
)


# -- value bases


@pytest.mark.parametrize("basis", ["native", "random", "pca", "output"])
@pytest.mark.parametrize("adapter", ["none", "lora", "routed"])
def test_fold_leaves_logits_unchanged(basis, adapter):
    """Folding a basis into W_v, its bias, W_o and adapters on both changes no logit (keep-all, so
    that nothing else plays in)."""
    model = tiny_model()
    want_base = model(tokens(2, 33))
    kv_router.attach(model, KVConfig(value_basis=basis, topk_groups=4), [tokens(2, 40, seed=5)])
    lora.attach(model, AdapterConfig(adapter=adapter, lora_dropout=0.0))
    for key, p in lora.adapter_state(model).items():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(len(key)))
    before = model(tokens(2, 33))
    if adapter == "none":
        assert (before - want_base).abs().max() < 1e-9
    weight = model.layers[0].self_attn.v_proj.weight.clone()
    after = kv_router.fold(model)(tokens(2, 33))
    assert (after - before).abs().max() < 1e-9
    assert basis == "native" or not torch.equal(weight, model.layers[0].self_attn.v_proj.weight)


@each_setting
def test_folded_equals_unfolded_when_groups_are_dropped(setting):
    """Training (basis applied by the path) and inference (basis folded) route the same groups and
    give the same logits."""
    free = grouped_model(fold=False, **setting)
    folded = grouped_model(**setting)
    assert (free(tokens(3, 41)) - folded(tokens(3, 41))).abs().max() < 1e-8


def test_output_basis_error_is_what_the_output_projection_writes():
    """In the `output` basis squared error summed over the query heads of W_o (v - v') equals
    squared error in z up to one scale."""
    g = torch.Generator().manual_seed(1)
    Hkv = 3
    n = 2
    D = 16
    E = 40
    a = torch.randn(Hkv, 200, D, generator=g, dtype=torch.float64)
    cov = a.mT @ a
    w_o = torch.randn(E, Hkv * n * D, generator=g, dtype=torch.float64)
    fwd, bwd = value_basis("output", cov, w_o)
    assert (fwd @ bwd - torch.eye(D)).abs().max() < 1e-9
    w = w_o.view(E, Hkv, n, D)
    ratios = []
    for h in range(Hkv):
        e = torch.randn(D, generator=g, dtype=torch.float64)
        written = sum((w[:, h, i] @ e).square().sum() for i in range(n))
        ratios.append(float((e @ fwd[h]).square().sum() / written))
    assert max(ratios) / min(ratios) - 1 < 1e-9
    second = fwd.mT @ cov @ fwd  # diagonal, largest first
    off = second - torch.diag_embed(second.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-9 * second.abs().max()
    assert (second.diagonal(dim1=1, dim2=2).diff() <= 1e-9).all()


def test_pca_basis_diagonalises_and_is_orthogonal():
    """`pca` gives uncorrelated dimensions, most energy first, and is a rotation; `random` is a
    rotation that the seed decides."""
    a = torch.randn(2, 90, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cov = a.mT @ a
    fwd, bwd = value_basis("pca", cov, torch.zeros(1, 32))
    z = a @ fwd
    second = z.mT @ z
    assert (second - torch.diag_embed(second.diagonal(dim1=1, dim2=2))).abs().max() < 1e-9
    assert (second.diagonal(dim1=1, dim2=2).diff() <= 0).all() and torch.allclose(fwd.mT, bwd)
    one, two, other = (value_basis("random", cov, torch.zeros(1, 32), s)[0] for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert (one @ one.mT - torch.eye(16)).abs().max() < 1e-12


# -- routers


def test_norm_router_keeps_the_largest_energies():
    """The norm rule keeps, per head or summed over heads, exactly the K groups whose squared norms
    are largest."""
    for scope in ("layer", "head"):
        path = kv_router.ValueGroupPath(
            TINY, KVConfig(value_router="norm", mask_scope=scope, kv_tail=0)
        ).double()
        x, _, _, v = qkv(path)
        mask = top_k_mask(path.scores(x, v), 2)
        for b, t in itertools.product(range(2), range(9)):
            e = torch.tensor(
                [
                    [float((v[b, h, t, 4 * g : 4 * g + 4] ** 2).sum()) for g in range(4)]
                    for h in range(3)
                ]
            )
            for h, row in enumerate(e if scope == "head" else e.sum(0, keepdim=True)):
                assert sorted(mask[b, h, t].nonzero().flatten().tolist()) == sorted(
                    row.argsort(descending=True)[:2].tolist()
                )


def test_static_router_keeps_the_first_groups_of_every_token():
    """The ablation without routing: bits 0..K-1 for all tokens and heads."""
    path = kv_router.ValueGroupPath(
        TINY, KVConfig(value_router="static", n_groups=8, topk_groups=3)
    ).double()
    x, _, _, v = qkv(path)
    mask = top_k_mask(path.scores(x, v), 3)
    assert mask.shape == (2, 3, 9, 8) and mask[..., :3].all() and not mask[..., 3:].any()


def test_fitted_router_is_the_least_squares_solution():
    """Calibration leaves the router at the regression of group energies on [x, 1], in units of the
    mean energy."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 7, generator=g, dtype=torch.float64)
    e = torch.rand(500, 4, generator=g, dtype=torch.float64)
    ones = torch.cat((x, torch.ones(500, 1, dtype=torch.float64)), 1)
    router = torch.nn.Linear(7, 4).double()
    with torch.no_grad():
        fit_router(router, ones.T @ ones, ones.T @ e)
    want = torch.linalg.lstsq(ones, e / e.mean()).solution
    assert (router.weight.T - want[:-1]).abs().max() < 1e-3 and (
        router.bias - want[-1]
    ).abs().max() < 1e-3


def test_straight_through_is_hard_forward_and_soft_backward():
    """The mask that carries gradients equals the hard one in value and the softmax in gradient."""
    logits = torch.randn(
        3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    mask = top_k_mask(logits.detach(), 2)
    weight = torch.arange(4.0, dtype=torch.float64)
    m = straight_through(logits, mask)
    assert torch.allclose(m.detach(), mask.double(), atol=1e-15)
    (got,) = torch.autograd.grad((m * weight).sum(), logits)
    (want,) = torch.autograd.grad((logits.softmax(-1) * weight).sum(), logits)
    assert torch.allclose(got, want) and want.abs().max() > 0.01


# -- the path, masked


@each_setting
@pytest.mark.parametrize("pad", [None, (0, 4)], ids=["", "padded"])
def test_masked_path_equals_the_loops(setting, pad):
    """The differentiable path gives, to 1e-10, what token-by-token loops over softmax and rebuilt
    values give."""
    path = random_path(setting)
    pad = None if pad is None else torch.tensor(pad)
    x, q, k, v = qkv(path)
    got = path(x, q, k, v, pad)
    want = brute_force_path(path, x, q, k, v, pad)
    real = ~want.isnan()
    assert real.sum() > 100 and (got - want)[real].abs().max() < 1e-10


@each_setting
def test_masked_path_gradients_pass_gradcheck(setting):
    """Autograd through the routed attention equals finite differences, for q, k and v (the mask is
    a constant)."""
    path = random_path(setting, value_router="linear")
    x, q, k, v = qkv(path, B=1, T=5)
    inputs = [t.requires_grad_(True) for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *a: path(x, *a), inputs, fast_mode=True)


def test_keep_all_equals_dense_exactly():
    """K = S in the native basis is the dense model bit for bit, whatever router and
    reconstructor."""
    dense = tiny_model(dtype=torch.float32)
    want = dense(tokens(3, 57))
    for kind in ("zero", "mlp"):
        model = grouped_model(
            dtype=torch.float32, n_groups=8, topk_groups=8, value_basis="native", reconstructor=kind
        )
        assert torch.equal(model(tokens(3, 57)), want)


@pytest.mark.parametrize("prefill", ["exact", "routed"])
def test_keep_all_equals_dense_whatever_the_maps(prefill):
    """K = S with maps that are not inverse of each other: every logit is the dense model's bit for
    bit. A packed cache holds the dense keys and values, not encoded ones, and the logits read from
    it, like those of the folded model, agree to rounding."""
    setting = dict(
        topk_groups=4,
        value_basis="output",
        reconstructor="mlp",
        learn_basis=True,
        kv_tail=3,
        prefill=prefill,
    )
    x = tokens(2, 57)
    dense = tiny_model()
    free = grouped_model(fold=False, **setting)
    folded = grouped_model(**setting)
    want = dense(x)
    assert torch.equal(free(x), want) and (folded(x) - want).abs().max() < 1e-8
    for model in (free, folded):
        cache = model.new_cache(2, 57)
        whole = dense.new_cache(2, 57)
        got = read_in_pieces(model, x, cache, [30] + [1] * 27)
        assert (got - want).abs().max() < 1e-8
        dense.prefill(x, whole)
        k, v, mask = as_dense(cache.layers[0])
        assert mask.all() and int(cache.layers[0].n_packed[0]) == 54
        window = whole.layers[0].view().window
        assert (k - window.k).abs().max() < 1e-12
        assert model is folded or (v - window.v).abs().max() < 1e-12


@each_learned
@pytest.mark.parametrize("pad", [None, (0, 4)], ids=["", "padded"])
def test_learned_maps_have_the_loops_gradients(setting, pad):
    """The gradients of both maps, and of q, k, v through them, are to 1e-9 those of the
    token-by-token loops, and none is zero."""
    path = random_path(setting)
    pad = None if pad is None else torch.tensor(pad)
    x, q, k, v = qkv(path)
    inputs = [t.requires_grad_(True) for t in (q, k, v)] + [path.enc, path.dec]
    got = path(x, q, k, v, pad)
    want = brute_force_path(path, x, q, k, v, pad)
    weight = torch.randn(
        want.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    ).masked_fill(want.isnan(), 0)
    ours, plain = (
        torch.autograd.grad((out.nan_to_num() * weight).sum(), inputs) for out in (got, want)
    )
    for a, b in zip(ours, plain, strict=True):
        assert b.abs().max() > 1e-3 and (a - b).abs().max() < 1e-9


@each_learned
def test_learned_maps_pass_gradcheck(setting):
    """Autograd through the maps equals finite differences (the mask is a constant: the router here
    looks at the layer's input)."""
    path = random_path(setting, value_router="linear")
    x, q, k, v = qkv(path, B=1, T=5)

    def run(v, enc, dec):
        return torch.func.functional_call(path, {"enc": enc, "dec": dec}, (x, q, k, v))

    inputs = [t.detach().clone().requires_grad_(True) for t in (v, path.enc, path.dec)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_learned_maps_are_only_the_language_models():
    """L_LM trains both maps; L_aux trains neither, though it is measured in their coordinates; an
    adapter beside them still learns."""
    model = grouped_model(fold=False, learn_basis=True, reconstructor="mlp", value_basis="output")
    lora.attach(model, AdapterConfig(adapter="lora", lora_dropout=0.0))
    randomise(torch.nn.ParameterList(lora.adapter_state(model).values()), 0.2)
    kv_router.trainable(model)
    model.train()
    reached = []
    for loss in (
        lambda: model(tokens(2, 21)).square().mean(),
        lambda: (model(tokens(2, 21)), model.kv_losses()["aux"])[1],
    ):
        model.zero_grad()
        loss().backward()
        reached.append(
            {
                n.rsplit("kv_path.")[-1]
                for n, p in model.named_parameters()
                if p.grad is not None and p.grad.abs().max() > 0
            }
        )
    lm, aux = ({n for n in names if "lora_" not in n} for names in reached)
    rebuilding = {
        f"reconstructor.{name}.{p}" for name in ("up", "down") for p in ("weight", "bias")
    }
    assert lm == {"enc", "dec"} and aux == {"router.weight", "router.bias"} | rebuilding
    assert len(reached[0] - lm) == 16 and not reached[1] - aux


@each_setting
def test_no_output_depends_on_a_later_token(setting):
    """Causality: changing token 20 of 37 leaves the logits before it as they were, bit for bit, and
    changes its own."""
    model = grouped_model(**setting)
    a = tokens(1, 37)
    b = a.clone()
    b[0, 20] = (b[0, 20] + 1) % TINY.vocab_size
    x = model(a)
    y = model(b)
    assert torch.equal(x[:, :20], y[:, :20]) and not torch.equal(x[:, 20:], y[:, 20:])


# -- the path, packed

# an empty cache fills token by token, and so are the last tokens of a tile and the next one read
SINGLE = (1,) * 20 + (37,) + (1,) * 10


@each_setting
@pytest.mark.parametrize(
    ("chunks", "decode"),
    [((67,), False), (SINGLE, True), (SINGLE, False), ((30, 1, 1, 5, 29, 1), True)],
    ids=["one", "token by token", "prefilled token by token", "mixed"],
)
def test_packed_equals_masked(setting, chunks, decode):
    """Logits from the packed cache, in any pieces, by either verb, padded rows too, equal the
    uncached forward's (past a 64-token tile)."""
    model = grouped_model(**setting)
    x = tokens(3, 67)
    for pad in (None, torch.tensor([0, 5, 66])):
        want = model(x, pad=pad)
        cache = model.new_cache(3, 67)
        difference = read_in_pieces(model, x, cache, chunks, pad, decode) - want
        assert cache.length == 67
        for b in range(3):
            assert difference[b, 0 if pad is None else pad[b] :].abs().max() < 1e-8


@each_setting
def test_exact_prefill_then_decoding_equals_the_loops(setting):
    """With prefill=exact the prompt reads whole values, and every later token reads the prompt's
    packed ones."""
    path = random_path(setting, prefill="exact")
    x, q, k, v = qkv(path, T=13)
    pad = torch.tensor([0, 3])
    cache = path.new_cache(2, 13, v)
    got = [path.prefill(x[:, :8], q[:, :, :8], k[:, :, :8], v[:, :, :8], cache, pad)]
    for t in range(8, 13):
        new = slice(t, t + 1)
        got.append(path.decode(x[:, new], q[:, :, new], k[:, :, new], v[:, :, new], cache))
    got = torch.cat(got, 2)
    want = brute_force_path(path, x, q, k, v, pad, exact_until=8)
    real = ~want.isnan()
    assert real.sum() > 100 and (got - want)[real].abs().max() < 1e-10


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    "setting",
    [dict(reconstructor="mlp"), dict(), dict(learn_basis=True), dict(topk_groups=4)],
    ids=["mlp", "zero", "maps", "whole"],
)
def test_decode_reads_values_rebuilt_one_by_one(setting, fold):
    """A step over a cache packed with random masks is dense attention over values that loops
    rebuild, token by token, behind them the window's whole ones, float64, padding too."""
    model = grouped_model(fold=fold, mask_scope="head", prefill="exact", kv_tail=3, **setting)
    path = next(iter(kv_router.paths(model).values()))
    T = 29
    x, q, k, v = qkv(path, T=T)
    cache = path.new_cache(2, 40, k)
    mask = top_k_mask(torch.randn(2, 3, T, 4, generator=torch.Generator().manual_seed(1)), path.k)
    n_pad = torch.tensor([0, 4])
    old = slice(0, T - 1)
    with torch.no_grad():
        cache.append(NewTokens(k[:, :, old], v[:, :, old], n_pad, mask[:, :, old]))
        got = path.decode(x[:, -1:], q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], cache)
        z = coordinates(path, v)
        for b, pad in enumerate(n_pad.tolist()):
            values = v[b].clone()
            for t in range(T - 3):
                kept = [mask[b, h, t].nonzero().flatten().tolist() for h in range(3)]
                values[:, t] = routed_value(path, z[b, :, t], kept)
                if not path.folded and path.k < path.S:
                    values[:, t] = torch.stack([values[h, t] @ path.dec[h] for h in range(3)])
            want = torch.nn.functional.scaled_dot_product_attention(
                q[b : b + 1, :, -1:], k[b : b + 1, :, pad:], values[None, :, pad:], enable_gqa=True
            )
            assert (got[b] - want[0]).abs().max() < 1e-10
    assert packed_count(torch.tensor(T), 3, 1) == T - 3
    assert cache.n_packed.tolist() == [T - 3, T - 3 - 4]


def test_exact_prefill_gives_the_dense_models_logits():
    """The prompt's own logits under exact prefill are the dense model's: only what is kept for
    later is compressed."""
    model = grouped_model(value_basis="native", prefill="exact")
    x = tokens(2, 45)
    got = model.prefill(x, model.new_cache(2, 45), last_only=False)
    assert (got - tiny_model()(x)).abs().max() < 1e-9


def test_decode_mode_perplexity_equals_token_by_token_packed_decoding():
    """The loss every table reports is that of feeding the tokens one at a time through the packed
    cache."""
    model = grouped_model(value_basis="output", prefill="exact")
    x = tokens(3, 50)
    cache = model.new_cache(3, 49)
    total = 0.0
    for t in range(49):
        logits = model.decode(x[:, t : t + 1], cache)[:, 0]
        total += float(torch.nn.functional.cross_entropy(logits, x[:, t + 1]).detach())
    assert abs(tasks.mean_loss(model, x[:, :-1], x[:, 1:], 2) - total / 49) < 1e-9
    dense = tasks.mean_loss(tiny_model(), x[:, :-1], x[:, 1:], 2)
    assert abs(dense - total / 49) > 1e-3  # and it is not the uncompressed model's


# -- losses


def test_lm_loss_and_aux_loss_reach_only_their_own_parameters():
    """By default L_LM trains adapters and not router or reconstructor; L_aux the reverse, and
    nothing before it; lm_to_router joins them; with a dense tail and without."""
    for joined, tail in itertools.product((False, True), (0, 3)):
        model = grouped_model(
            fold=False,
            dtype=torch.float32,
            reconstructor="mlp",
            lm_to_router=joined,
            kv_tail=tail,
        )
        lora.attach(model, AdapterConfig(lora_dropout=0.0))
        routers = kv_router.trainable(model)
        adapters = list(lora.adapter_state(model).values())
        randomise(torch.nn.ParameterList(adapters), 0.2)
        model.train()
        loss = model(tokens(2, 21)).square().mean()
        on_router = torch.autograd.grad(loss, routers, retain_graph=True, allow_unused=True)
        reached = [g is not None and bool(g.abs().max() > 0) for g in on_router]
        assert all(reached) if joined else not any(reached)
        on_adapters = torch.autograd.grad(loss, adapters, allow_unused=True)
        assert all(g is not None and g.abs().max() > 0 for g in on_adapters)
        model(tokens(2, 21))
        aux = torch.autograd.grad(model.kv_losses()["aux"], routers + adapters, allow_unused=True)
        assert all(g is not None and g.abs().max() > 0 for g in aux[: len(routers)])
        assert all(g is None or g.abs().max() == 0 for g in aux[len(routers) :])


def test_aux_loss_is_the_mean_squared_error_of_the_rebuilt_value():
    """L_aux of a layer equals a hand-made MSE between whole and routed values, and is the same for
    any split of the batch."""
    path = random_path(PAPER_LIKE, reconstructor="mlp").train()
    x, q, k, v = qkv(path, B=4)
    path(x, q, k, v)
    whole = float(path.losses["aux"].detach())
    parts = []
    for b in range(4):
        path(x[b : b + 1], q[b : b + 1], k[b : b + 1], v[b : b + 1])
        parts.append(float(path.losses["aux"].detach()))
    mask = top_k_mask(path.scores(x, v), 2)
    kept = v * expand_mask(mask, 16)
    routed = torch.where(expand_mask(mask, 16), kept, path.reconstructor(kept, mask))
    assert (
        abs(whole - float((routed - v).square().mean().detach())) < 1e-12
        and abs(whole - sum(parts) / 4) < 1e-12
    )


# -- the model around it


def kept(model, T: int) -> tuple[float, float]:
    """KV kept in compressed layers and in the whole model, of a cache of T tokens."""
    shares = kept_shares(model, filled_cache(model, tokens(1, T)))
    return shares["kv_kept_layers"], shares["kv_kept_model"]


def test_uncompressed_layers_stay_dense_and_are_counted():
    """kv_layers leaves other layers alone, and whole-model KV counts them at 1."""
    model = tiny_model()
    kv_router.attach(model, KVConfig(kv_layers="deepest:0.5", kv_tail=0), [tokens(1, 20)])
    cache = model.new_cache(1, 10)
    assert isinstance(cache.layers[0], DenseCache) and not isinstance(cache.layers[1], DenseCache)
    assert kept(model, 40) == (0.75, 0.875)
    tail = grouped_model(kv_tail=8)
    assert kept(tail, 40) == ((1 + (0.5 * 32 + 8) / 40) / 2,) * 2
    for text in ("deepest:0.2", "7", "x", "", "deepest:2"):
        with pytest.raises(ValueError, match="kv_layers"):
            KVConfig(kv_layers=text).layers(2)


@pytest.mark.parametrize("learned", [False, True], ids=["", "learned"])
def test_state_round_trip_restores_logits_and_refuses_what_does_not_fit(learned):
    """state / load_state carry bases, trained ones too, routers and reconstructors; a missing,
    strange or non-finite tensor is refused by name."""
    cfg = dict(value_basis="output", reconstructor="mlp", learn_basis=learned)
    model = grouped_model(fold=False, **cfg)
    saved = {k: t.clone() for k, t in kv_router.state(model).items()}
    other = kv_router.attach(tiny_model(), KVConfig(**PAPER_LIKE, **cfg))
    kv_router.load_state(other, saved)
    assert torch.equal(other(tokens(2, 19)), model(tokens(2, 19)))
    assert (kv_router.fold(other)(tokens(2, 19)) - model(tokens(2, 19))).abs().max() < 1e-9
    key = next(k for k in saved if k.endswith("router.weight"))
    for bad in (
        {k: t for k, t in saved.items() if k != key},
        {**saved, "extra": saved[key]},
        {**saved, key: saved[key] * math.nan},
        {**saved, key: saved[key][:-1]},
        {k: t for k, t in saved.items() if "basis_fwd" not in k},
    ):
        with pytest.raises(ValueError, match=r"router\.weight|extra|basis"):
            kv_router.load_state(kv_router.attach(tiny_model(), KVConfig(**PAPER_LIKE, **cfg)), bad)


def test_set_kept_changes_the_budget_and_refuses_what_is_no_budget():
    """Any K of 1..S works for zero and mlp; others are refused."""
    model = grouped_model(reconstructor="mlp")
    kv_router.set_kept(model, 4)
    assert kept(model, 9) == (1.0, 1.0)
    for k in (0, 5):
        with pytest.raises(ValueError, match="K="):
            kv_router.set_kept(model, k)
