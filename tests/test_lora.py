"""Adapters against explicit per-token, per-branch loops: B = 0, gradients, whole models (promise
15)."""

import itertools

import pytest
import torch
from adapters_by_hand import (
    ALPHA,
    KE,
    KINDS,
    NAMES,
    SHAPE,
    E,
    K,
    R,
    S,
    adapted,
    adapter_by_hand,
    assert_close,
    base_tensors,
    config,
    ids,
    normal,
    recorded,
)
from helpers import tiny_model

import lora
from storage.dropout import dropout

# ---- at the start


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_b_equals_base_bitwise(kind, dropout):
    """An adapter just attached changes no logit by one bit, in training and in evaluation; the
    base's weights are shared, not copied."""
    base = tiny_model(0, torch.float32, SHAPE)
    x = ids(3, 9)
    want = base(x).detach()
    pointers = {k: t.data_ptr() for k, t in base.state_dict().items()}
    model = lora.attach(base, config(kind, lora_dropout=dropout))
    assert lora.adapter_state(model) and all(
        model.state_dict()[k].data_ptr() == p for k, p in pointers.items()
    )
    for training in (True, False):
        assert torch.equal(model.train(training)(x), want)
    torch.nn.init.normal_(model.layers[1].mlp.up_proj.lora_B)
    assert not torch.equal(model(x), want)


def test_attach_none_freezes_and_adds_nothing():
    """adapter=none leaves no trainable parameter and no new tensor."""
    model = lora.attach(tiny_model(0, torch.float64, SHAPE), config("none"))
    assert (
        lora.count_trainable(model) == 0
        and not lora.adapter_state(model)
        and lora.balance_loss(model) == 0.0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_attach_twice_is_refused(kind):
    """A second adapter of any kind is a one-line ValueError and changes nothing."""
    model = adapted(kind)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    for other in ("none", *KINDS):
        with pytest.raises(ValueError, match="one adapter at a time") as e:
            lora.attach(model, config(other))
        assert len(str(e.value).splitlines()) == 1
    assert before.keys() == model.state_dict().keys() and all(
        torch.equal(t, before[k]) for k, t in model.state_dict().items()
    )


@pytest.mark.parametrize(
    "kind, want",
    [
        ("lora", 2 * R * ((12 + 24) + 2 * (12 + 12) + (24 + 12) + 2 * (12 + 17) + (17 + 12))),
        (
            "routed",
            2 * (S * R * (36 + 24 + 24 + 36 + 29 + 29 + 29) + S * (5 * 12 + 24 + 17) + 7 * S),
        ),
        ("moe_lora", 2 * (E * R * (36 + 24 + 24 + 36 + 29 + 29 + 29) + 2 * (E * 12 + E))),
    ],
)
def test_count_trainable_equals_hand_count(kind, want):
    """Two layers, R (d_in + d_out) per branch; a router has d_in + 1 per branch: one per
    projection, or one each for attention and MLP."""
    model = adapted(kind)
    assert (
        lora.count_trainable(model)
        == want
        == sum(t.numel() for t in lora.adapter_state(model).values())
    )


def test_targets_choose_the_projections():
    """Only the projections named in lora_targets get adapters; the rest stay plain nn.Linear."""
    model = adapted("routed", lora_targets="v,down")
    found = {name for name, m in model.named_modules() if isinstance(m, lora.LoRALinear)}
    assert found == {
        f"layers.{i}.{n}" for i in range(2) for n in ("self_attn.v_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_learn(kind):
    """Every adapter tensor gets a gradient that is not zero, no base tensor gets one; AdamW steps
    with decay leave the base bitwise."""
    model = adapted(kind).train()
    base = base_tensors(model)
    before = {k: t.detach().clone() for k, t in lora.adapter_state(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        (model(ids(3, 9)).square().mean() + lora.balance_loss(model)).backward()
        for name, p in model.named_parameters():
            if name in before:
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, (
                    name
                )
            else:
                assert p.grad is None and not p.requires_grad, name
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[k], t) for k, t in base.items())
    assert all(not torch.equal(after[k], t) for k, t in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_eval_never_rewrite_weights(kind):
    """Switching modes, with forwards in between, changes no tensor and moves none (loralib's merge
    on eval would)."""
    model = adapted(kind, lora_dropout=0.3)
    x = ids(2, 7)
    before = {k: (t.data_ptr(), t.clone()) for k, t in model.state_dict().items()}
    want = model(x)
    for _ in range(2):
        model.train()(x)
        assert torch.equal(model.eval()(x), want)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(
        after[k].data_ptr() == p and torch.equal(after[k], t) for k, (p, t) in before.items()
    )


# ---- the equation


@pytest.mark.parametrize("kind", KINDS)
def test_projections_equal_explicit_loop(kind):
    """Each adapted projection, in place in the model, gives W x + sum_n r_n (alpha / R) B_n A_n x
    computed token by token. Routed: its own router reads its own input. MoE: the shared router
    reads the input of the attention or MLP, for o and down as well."""
    model = adapted(kind)
    seen = recorded(model, ids(2, 5))
    for i, name in itertools.product(range(2), NAMES):
        m = model.get_submodule(f"layers.{i}.{name}")
        (x, got) = seen[f"layers.{i}.{name}"]
        if kind == "lora":
            branch = (x, 1)
        elif kind == "routed":
            branch = (x, S, (m.gate.linear.weight, m.gate.linear.bias), K)
        else:
            parent = f"layers.{i}.{name.split('.')[0]}"
            router = model.get_submodule(parent).lora_router.linear
            branch = (
                seen[f"{parent}.{'q' if 'attn' in parent else 'gate'}_proj"][0],
                E,
                (router.weight, router.bias),
                KE,
            )
        want = adapter_by_hand(x, branch[0], m.weight, m.bias, m.lora_A, m.lora_B, *branch[1:])
        assert (m.bias is not None) == (name[-6:] in ("q_proj", "k_proj", "v_proj"))
        assert_close(got, want)
        # the update is not small beside the tolerance
        assert (got - torch.nn.functional.linear(x, m.weight, m.bias)).abs().max() > 0.01


def test_moe_router_is_shared_by_its_block():
    """MoE-LoRA has one router per attention and one per MLP, run once per forward."""
    model = adapted("moe_lora")
    calls = []
    routers = [m for m in model.modules() if isinstance(m, lora.Gate)]
    for m in routers:
        m.register_forward_hook(lambda m, a, y: calls.append(m))
    model(ids(2, 5))
    assert len(routers) == 4 and calls == routers


def test_routed_gradients_equal_explicit_loop():
    """Gradients of input, A, B, router weight and bias equal autograd's through the explicit loop,
    float64."""
    m = adapted("routed").layers[0].mlp.down_proj
    x = normal(2, 5, 17)
    c = normal(2, 5, 12, seed=3)
    inputs = [x.requires_grad_(), m.lora_A, m.lora_B, m.gate.linear.weight, m.gate.linear.bias]
    got = torch.autograd.grad((m(x) * c).sum(), inputs)
    y = adapter_by_hand(
        x, x, m.weight, m.bias, m.lora_A, m.lora_B, S, (m.gate.linear.weight, m.gate.linear.bias), K
    )
    for a, b in zip(got, torch.autograd.grad((y * c).sum(), inputs), strict=True):
        assert b.abs().max() > 0.1
        assert_close(a, b)


@pytest.mark.parametrize("kind", ["lora", "routed"])
def test_projection_passes_gradcheck(kind):
    """Finite differences agree with backward in float64 (no logit within reach of a tie), for input
    and every trainable tensor."""
    m = adapted(kind).layers[0].self_attn.k_proj
    x = normal(2, 3, 12)
    names = [n for n, p in m.named_parameters() if p.requires_grad]
    if kind == "routed":
        ordered = m.gate.linear(x).sort(-1).values
        assert (ordered[..., S - K] - ordered[..., S - K - 1]).min() > 1e-3

    def f(x, *tensors):
        return torch.func.functional_call(m, dict(zip(names, tensors, strict=True)), (x,))

    values = [dict(m.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(f, (x.requires_grad_(), *values))


@pytest.mark.parametrize("kind", ["lora", "routed"])
def test_dropout_touches_only_the_branch(kind):
    """In training the adapter (A, and a projection's own router) reads dropout(x), scaled by 1 / (1
    - p); the base reads x whole. In evaluation nothing is dropped."""
    m = adapted(kind, lora_dropout=0.5).layers[0].self_attn.q_proj.train()
    x = normal(2, 5, 12)
    torch.manual_seed(3)
    got = m(x)
    torch.manual_seed(3)
    dropped = dropout(x, 0.5, True)
    router = () if kind == "lora" else ((m.gate.linear.weight, m.gate.linear.bias), K)
    zero = torch.zeros_like(m.weight)
    base = torch.nn.functional.linear(x, m.weight, m.bias)
    n = 1 if kind == "lora" else S
    assert_close(
        got, base + adapter_by_hand(dropped, dropped, zero, None, m.lora_A, m.lora_B, n, *router)
    )
    assert_close(
        m.eval()(x), base + adapter_by_hand(x, x, zero, None, m.lora_A, m.lora_B, n, *router)
    )
    assert (m(x) - got).abs().max() > 0.1


# ---- whole models


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_model_keeps_the_invariants(kind):
    """With random adapters: no logit sees a later token, batch order does not matter, cached
    decoding in odd chunks equals uncached."""
    model = adapted(kind)
    x = ids(3, 9)
    out = model(x)
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 3) % SHAPE.vocab_size
    assert_close(model(changed)[:, :5], out[:, :5])
    assert ((model(changed) - out)[:, 5:].abs().amax(-1) > 1e-4).all()
    order = torch.tensor([2, 0, 1])
    assert_close(model(x[order]), out[order])
    assert_close(model(x[1:2])[0], out[1])
    cache = model.new_cache(3, 9)
    pieces = x.split((4, 1, 1, 3), 1)
    seen = [model.prefill(piece, cache, last_only=False) for piece in pieces]
    assert_close(torch.cat(seen, 1), out)


def test_routed_update_is_token_wise():
    """A token's routed update depends on that token alone: any order of tokens, flat or batched,
    gives the same rows."""
    m = adapted("routed").layers[1].mlp.gate_proj
    x = normal(3, 7, 12)
    y = m(x)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    assert_close(m(x[:, order]), y[:, order])
    assert_close(m(x.reshape(1, 21, 12)).view_as(y), y)
    assert_close(m(x[:, 3:4]), y[:, 3:4])


def test_routed_full_budget_uses_every_branch():
    """K = S: all branches take part, weighed by the plain softmax, equal to the loop over all of
    them."""
    m = adapted("routed", subspace_topk=S).layers[0].self_attn.v_proj
    x = normal(2, 5, 12)
    r = m.gate.linear(x).softmax(-1)
    A = m.lora_A.view(S, R, 12)
    B = m.lora_B.view(12, S, R)
    want = torch.nn.functional.linear(x, m.weight, m.bias) + ALPHA / R * torch.einsum(
        "bts,osr,srd,btd->bto", r, B, A, x
    )
    assert_close(m(x), want)
    few = adapted("routed").layers[0].self_attn.v_proj  # the same numbers with K = 2
    assert torch.equal(few.lora_B, m.lora_B) and (few(x) - m(x)).abs().max() > 0.01


def test_one_branch_of_either_kind_is_plain_lora():
    """With a single branch the gate is 1: routed and MoE-LoRA equal LoRA with the same A and B."""
    x = ids(2, 7)
    plain = adapted("lora")
    want = plain(x)
    for kind in ("routed", "moe_lora"):
        model = adapted(kind, subspaces=1, subspace_topk=1, experts=1, expert_topk=1)
        lora.load_adapter_state(model, {**lora.adapter_state(model), **lora.adapter_state(plain)})
        assert_close(model(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_needs_no_autocast(kind):
    """What is trained has float32: a base of bfloat16 under untrained adapters is the base, bit for
    bit, under trained ones near the same model in float32."""
    base = tiny_model(0, torch.bfloat16, SHAPE)
    x = ids(2, 9)
    untrained = adapted(kind, dtype=torch.bfloat16, random=False)
    assert torch.equal(untrained(x), base(x))
    got = adapted(kind, dtype=torch.bfloat16)
    want = adapted(kind, dtype=torch.bfloat16).float()
    off = (got(x).float() - want(x)).std() / want(x).std()
    assert got(x).dtype == torch.bfloat16 and off < 0.1
    assert (want(x) - base(x).float()).std() / want(x).std() > 0.2


@pytest.mark.parametrize("p", [0.0, 0.05, 0.4, 1 - 2**-20])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    """Of a million ones: those left are all 1 / (1 - p), as many as asked for by four standard
    deviations, drawn anew each time and the same with the same seed; gradients have the mask. A
    share too near to 1 for 16 bits is PyTorch's own; without training nothing is dropped."""
    x = torch.ones(1000, 999, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, p, True)
    left = y != 0
    share = left.double().mean().item()
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
    torch.testing.assert_close(y[left], torch.full_like(y[left], 1 / (1 - p)), rtol=1e-4, atol=0)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert p == 0 or not torch.equal(dropout(x, p, True), y) or p > 0.9
    torch.manual_seed(0)
    assert torch.equal(dropout(x, p, True), y)
    assert torch.equal(dropout(x, p, False), x)
    if 0 < p < 0.9:  # neighbours are drawn apart: no share of four by one draw
        together = (left.flatten()[:-1] & left.flatten()[1:]).double().mean().item()
        assert abs(together - share**2) < 0.003
