"""Adapters against explicit per-token, per-branch loops: B = 0, gates, gradients, balance, merge,
files, statistics (promise 15)."""

import copy
import itertools
import math

import pytest
import torch
from helpers import randomise, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import lora
from config import ModelConfig
from settings.adapters import AdapterConfig
from storage.dropout import dropout
from storage.layout import top_k_mask

SHAPE = ModelConfig(
    vocab_size=23,
    block_size=31,
    n_layer=2,
    n_embd=12,
    n_head=4,
    n_kv_head=2,
    head_dim=6,
    n_inner=17,
    qkv_bias=True,
    tie_embeddings=False,
)
ALL = "q,k,v,o,gate,up,down"
KINDS = ["lora", "moe_lora", "routed"]
R = 3
ALPHA = 5.0
S = 5
K = 2
E = 4
KE = 3
NAMES = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def config(kind: str, **kw) -> AdapterConfig:
    return AdapterConfig(
        **{
            "adapter": kind,
            "r": R,
            "alpha": ALPHA,
            "lora_dropout": 0.0,
            "lora_targets": ALL,
            "subspaces": S,
            "subspace_topk": K,
            "experts": E,
            "expert_topk": KE,
            **kw,
        }
    )


def adapted(
    kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, random: bool = True, **kw
):
    """A random tiny model with adapters; `random` draws lora_A, lora_B and routers too: a zero B
    hides every error."""
    model = lora.attach(tiny_model(seed, dtype, SHAPE), config(kind, **kw))
    if random:
        torch.manual_seed(seed + 100)
        for name, p in lora.adapter_state(model).items():
            torch.nn.init.normal_(p, std=0.3 if "lora_" in name else 1.0)
    return model.eval()


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(SHAPE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def base_tensors(model) -> dict[str, torch.Tensor]:
    own = lora.adapter_state(model)
    return {k: t.clone() for k, t in model.state_dict().items() if k not in own}


def assert_close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def gates_by_hand(x, weight, bias, k: int):
    """Gates of one token x (d,): softmax over the k largest logits (equal ones: the lower index),
    exactly 0 elsewhere."""
    logits = weight @ x + bias
    kept = sorted(range(len(logits)), key=lambda s: (-logits[s].item(), s))[:k]
    top = torch.stack([logits[s] for s in kept])
    e = (top - top.max()).exp()
    zero = torch.zeros((), dtype=x.dtype)
    return torch.stack(
        [e[kept.index(s)] / e.sum() if s in kept else zero for s in range(len(logits))]
    )


def adapter_by_hand(x, seen, weight, bias, A, B, n: int, router=None, k: int = 0):
    """y = W x + b + sum_n r_n (alpha / R) B_n (A_n x), token by token and branch by branch; the
    router reads `seen`."""
    out = torch.zeros(*x.shape[:2], len(weight), dtype=x.dtype)
    for b, t in itertools.product(range(x.size(0)), range(x.size(1))):
        y = weight @ x[b, t] + (0 if bias is None else bias)
        r = [1.0] if router is None else gates_by_hand(seen[b, t], *router, k)
        for s in range(n):
            rows = slice(s * R, (s + 1) * R)
            y = y + r[s] * (ALPHA / R) * (B[:, rows] @ (A[rows] @ x[b, t]))
        out[b, t] = y
    return out


def recorded(model, x) -> dict[str, tuple]:
    """Name of every module -> (first input, output) of one forward."""
    seen = {}
    hooks = []
    for name, m in model.named_modules():
        hooks.append(
            m.register_forward_hook(lambda _, a, y, name=name: seen.__setitem__(name, (a[0], y)))
        )
    model(x)
    for h in hooks:
        h.remove()
    return seen


def router_logits(model, x) -> dict[str, torch.Tensor]:
    """Name of every router -> its scores (B, T, n) in one forward, from the input of the projection
    or block that owns it."""
    seen = recorded(model, x)
    # attention's input
    seen |= {
        name.removesuffix(".q_proj"): io
        for name, io in seen.items()
        if name.endswith("attn.q_proj")
    }
    return {
        name: m.linear(seen[name.rsplit(".", 1)[0]][0])
        for name, m in model.named_modules()
        if isinstance(m, lora.Gate)
    }


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


# ---- gates


@pytest.mark.parametrize("n, k", [(5, 1), (5, 2), (7, 6), (3, 3)])
def test_gate_has_k_entries_that_sum_to_one(n, k):
    """Exactly k gates are not zero, they sum to 1, and they equal the hand-made softmax; float32
    input gives float32 gates."""
    torch.manual_seed(5)
    gate = randomise(lora.Gate(9, n, k), 1.0).double()
    x = normal(2, 11, 9)
    got = gate(x)
    assert ((got != 0).sum(-1) == k).all()
    assert_close(got.sum(-1), torch.ones(2, 11, dtype=torch.float64), 1e-15)
    for b, t in itertools.product(range(2), range(11)):
        assert_close(
            got[b, t], gates_by_hand(x[b, t], gate.linear.weight, gate.linear.bias, k), 1e-14
        )
    assert gate.float()(x.float()).dtype == torch.float32


def test_gate_ties_go_to_the_lower_index():
    """Equal logits: the lower branches are kept, each with 1 / k; a larger one still comes
    first."""
    gate = lora.Gate(4, 5, 2).double()
    torch.nn.init.zeros_(gate.linear.weight)
    gate.linear.bias.data = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert gate(normal(1, 1, 4))[0, 0].tolist() == [0, 0.5, 0.5, 0, 0]
    gate.linear.bias.data = torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    got = gate(normal(1, 1, 4))[0, 0]
    assert (
        got[1:3].tolist() == [0, 0]
        and got[4] == 0
        and got[3].item() == pytest.approx(math.e / (1 + math.e))
        and 0 < got[0] < got[3]
    )


def test_gate_full_budget_is_plain_softmax():
    """k = n keeps every branch: the gates are softmax of the logits."""
    torch.manual_seed(6)
    gate = randomise(lora.Gate(9, 4, 4), 1.0).double()
    x = normal(3, 5, 9)
    assert_close(gate(x), gate.linear(x).softmax(-1), 1e-15)
    assert (gate(x) > 0).all()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 9).flatmap(
        lambda n: st.lists(
            st.lists(
                st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1e-9, 2.0, math.inf]),
                min_size=n,
                max_size=n,
            ),
            min_size=1,
            max_size=4,
        )
    ),
    data=st.data(),
)
def test_top_k_mask_equals_sorting(rows, data):
    """The mask marks the first k of the indices sorted by (-score, index): ties, signed zeros and
    infinities included."""
    k = data.draw(st.integers(1, len(rows[0])))
    got = top_k_mask(torch.tensor(rows), k)
    assert got.dtype == torch.bool
    for row, mask in zip(rows, got.tolist(), strict=True):
        kept = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        assert mask == [i in kept for i in range(len(row))]


# ---- load balance


def balance_by_hand(logits: torch.Tensor, k: int) -> float:
    """n * sum_i (share of token slots routed to i) * (mean softmax probability of i), per sequence,
    then the mean over sequences."""
    B, T, n = logits.shape
    total = 0.0
    for b in range(B):
        count = [0] * n
        prob = [0.0] * n
        for t in range(T):
            row = logits[b, t].tolist()
            z = sum(map(math.exp, row))
            for i in sorted(range(n), key=lambda i: (-row[i], i))[:k]:
                count[i] += 1
            prob = [p + math.exp(v) / z for p, v in zip(prob, row, strict=True)]
        total += n * sum(c / (T * k) * p / T for c, p in zip(count, prob, strict=True))
    return total / B


@pytest.mark.parametrize("kind, k", [("routed", K), ("moe_lora", KE)])
def test_balance_loss_equals_hand_written_loop(kind, k):
    """balance_loss is the mean over all routers of the Switch form, computed per sequence, of the
    last training forward."""
    model = adapted(kind).train()
    want = [balance_by_hand(y, k) for y in router_logits(model, ids(3, 7)).values()]
    assert len(want) == (14 if kind == "routed" else 4)
    assert lora.balance_loss(model).item() == pytest.approx(sum(want) / len(want), rel=1e-6)
    assert max(want) > 1.05
    model.eval()(ids(3, 7, seed=8))
    # evaluation leaves it
    assert lora.balance_loss(model).item() == pytest.approx(sum(want) / len(want), rel=1e-6)


def test_balance_loss_gradient_equals_hand_written_formula():
    """The loss pulls on the probabilities only: d/dlogits = n/B * share . d(mean softmax), the
    shares being constants."""
    torch.manual_seed(7)
    gate = randomise(lora.Gate(5, 4, 2), 1.0).double().train()
    x = normal(3, 7, 5)
    gate(x)
    got = torch.autograd.grad(gate.balance, gate.linear.weight)[0]
    p = gate.linear(x).detach().softmax(-1)
    share = torch.zeros(3, 4, dtype=torch.float64)
    for b, t in itertools.product(range(3), range(7)):
        share[b, p[b, t].topk(2).indices] += 1 / 14
    share = share[:, None]
    want = 4 / 21 * torch.einsum("bti,btd->id", p * (share - (p * share).sum(-1, keepdim=True)), x)
    assert want.abs().max() > 1e-3
    assert_close(got, want, 1e-7)


def test_balance_is_one_when_uniform_and_n_over_k_at_worst():
    """Tokens that visit every branch alike give exactly 1; all tokens on the same K branches give N
    / K."""
    gate = lora.Gate(3, 3, 1).double().train()
    gate.linear.weight.data = 50 * torch.eye(3, dtype=torch.float64)
    torch.nn.init.zeros_(gate.linear.bias)
    cycle = torch.eye(3, dtype=torch.float64).repeat(2, 1)[None]
    gate(cycle)
    assert gate.balance.item() == pytest.approx(1, abs=1e-6)
    gate(cycle[:, :1].expand(2, 5, 3))
    assert gate.balance.item() == pytest.approx(3, abs=1e-6)
    gate = lora.Gate(3, 5, 2).double().train()
    torch.nn.init.zeros_(gate.linear.weight)
    gate.linear.bias.data = torch.tensor([0.0, 50, 0, 50, 0], dtype=torch.float64)
    gate(cycle)
    assert gate.balance.item() == pytest.approx(5 / 2, abs=1e-6)


def test_balance_does_not_depend_on_how_a_batch_is_split():
    """The loss of a batch is the mean of its sequences' losses; pooling the tokens of the batch
    would give another number."""
    model = adapted("routed").train()
    x = ids(4, 7)

    def loss(rows):
        model(rows)
        return lora.balance_loss(model).item()

    whole = loss(x)
    parts = [loss(r) for r in x.split(1)]
    assert (
        whole
        == pytest.approx(sum(parts) / 4, rel=1e-6)
        == pytest.approx((loss(x[:2]) + loss(x[2:])) / 2, rel=1e-6)
    )
    pooled = [balance_by_hand(y.flatten(0, 1)[None], K) for y in router_logits(model, x).values()]
    assert abs(sum(pooled) / len(pooled) - whole) > 1e-3


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


# ---- merge


def test_merge_equals_unmerged():
    """The merged model has the base's names and plain nn.Linear modules, the adapted model's logits
    to 1e-12, and merges idempotently."""
    model = adapted("lora")
    x = ids(2, 9)
    want = model(x)
    base = tiny_model(0, torch.float64, SHAPE)
    assert lora.merge(model) is model
    assert not lora.adapter_state(model) and not [
        m for m in model.modules() if isinstance(m, lora.LoRALinear)
    ]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert_close(model(x), want)
    assert (want - base(x)).abs().max() > 0.1
    once = {k: t.clone() for k, t in model.state_dict().items()}
    assert all(torch.equal(t, once[k]) for k, t in lora.merge(model).state_dict().items())
    # a merged model can be adapted again
    assert lora.adapter_state(lora.attach(model, config("routed")))


def test_merge_leaves_the_weights_it_came_from():
    """Weights are shared with the base until merge, which writes to new ones."""
    model = adapted("lora")
    old = model.layers[0].mlp.up_proj.weight
    before = old.clone()
    lora.merge(model)
    assert torch.equal(old, before) and not torch.equal(model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize("kind", ["routed", "moe_lora"])
def test_merge_and_peft_export_refuse_routed_adapters(kind, tmp_path):
    """An update that depends on the token cannot be merged or exported: one-line errors, and
    nothing changes or is written."""
    model = adapted(kind)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="only plain LoRA") as e:
        lora.merge(model)
    with pytest.raises(ValueError, match="plain LoRA") as f:
        lora.export_peft(model, tmp_path / "out", "base")
    assert (
        all(len(str(x.value).splitlines()) == 1 for x in (e, f)) and not (tmp_path / "out").exists()
    )
    assert before.keys() == model.state_dict().keys() and all(
        torch.equal(t, before[k]) for k, t in model.state_dict().items()
    )


# ---- states


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_state_round_trip(kind):
    """An adapter saved from one model and loaded into another over the same base gives the same
    logits, bit for bit."""
    model = adapted(kind)
    other = adapted(kind, random=False)
    x = ids(2, 9)
    saved = {k: t.detach().clone() for k, t in lora.adapter_state(model).items()}
    assert not set(saved) & set(tiny_model(0, torch.float64, SHAPE).state_dict())
    assert set(saved) | set(base_tensors(model)) == set(model.state_dict())
    assert not torch.equal(model(x), other(x))
    lora.load_adapter_state(other, saved)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_state_faults_are_listed_and_nothing_is_loaded(kind):
    """Missing, unexpected, wrong-shaped, NaN and infinite tensors are refused together in one line
    that names each; the model stays."""
    model = adapted(kind)
    before = {k: t.detach().clone() for k, t in lora.adapter_state(model).items()}
    saved = {k: t + 1 for k, t in before.items()}
    missing = list(saved)[1]
    misshaped = list(saved)[2]
    nan = list(saved)[3]
    inf = list(saved)[4]
    del saved[missing]
    saved[misshaped] = saved[misshaped][:-1]
    saved[nan].view(-1)[-1] = math.nan
    saved[inf].view(-1)[0] = -math.inf
    saved["layers.0.mlp.ghost_proj.lora_A"] = torch.zeros(3)
    with pytest.raises(ValueError) as e:
        lora.load_adapter_state(model, saved)
    text = str(e.value)
    assert len(text.splitlines()) == 1 and text.startswith("adapter does not fit")
    sections = dict(
        part.split(": ", 1) for part in text.removeprefix("adapter does not fit: ").split("; ")[:-1]
    )
    assert sections == {
        "missing": missing,
        "unexpected": "layers.0.mlp.ghost_proj.lora_A",
        "not finite": f"{nan}, {inf}",
        "of another shape": f"{misshaped} {tuple(saved[misshaped].shape)} for {tuple(before[misshaped].shape)}",
    }
    assert all(torch.equal(t, before[k]) for k, t in lora.adapter_state(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_model_can_be_copied(kind):
    """deepcopy of a model gives an independent one: same logits, own weights, and projections that
    read their own block's router."""
    model = adapted(kind)
    x = ids(2, 7)
    twin = copy.deepcopy(model)
    want = model(x)
    assert torch.equal(twin(x), want)
    with torch.no_grad():
        for p in lora.adapter_state(twin).values():
            p.mul_(-2)
    assert torch.equal(model(x), want) and not torch.equal(twin(x), want)


# ---- statistics


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_routing_stats_of_a_planted_router(training):
    """A router planted to send known tokens to known branches reports those shares and their
    entropy, over several batches; the model keeps its mode and weights."""
    model = adapted("routed", lora_targets="q", subspaces=3, subspace_topk=1).train(training)
    with torch.no_grad():
        model.layers[0].input_layernorm.weight.fill_(1.0)
        model.embed_tokens.weight[:3] = torch.eye(12, dtype=torch.float64)[:3]
        gate = model.layers[0].self_attn.q_proj.gate.linear
        gate.weight.copy_(torch.eye(12)[:3])
        gate.bias.zero_()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    stats = lora.routing_stats(
        model, [torch.tensor([[0, 0, 1], [2, 0, 1]]), torch.tensor([[0, 0, 1]])]
    )
    got = stats["layers.0.self_attn.q_proj.gate"]
    assert got["share"] == pytest.approx([5 / 9, 3 / 9, 1 / 9])
    assert got["entropy"] == pytest.approx(
        -sum(p * math.log(p) for p in (5 / 9, 3 / 9, 1 / 9)), rel=1e-6
    )
    assert all(m.training == training for m in model.modules())
    # recording has stopped
    assert all(m.counts is None for m in model.modules() if isinstance(m, lora.Gate))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    one = lora.routing_stats(model, [torch.tensor([[1, 1, 1]])])["layers.0.self_attn.q_proj.gate"]
    # nothing is left from the first call
    assert one["share"] == [0, 1, 0] and one["entropy"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind, k, n_routers", [("routed", K, 14), ("moe_lora", KE, 4)])
def test_routing_stats_equal_a_count_by_hand(kind, k, n_routers):
    """For every router of a random model the shares sum to 1 and are the counts of kept branches
    over tokens x K."""
    model = adapted(kind)
    batches = [ids(3, 7), ids(1, 9, seed=4)]
    stats = lora.routing_stats(model, batches)
    assert len(stats) == n_routers
    seen = [router_logits(model, x) for x in batches]
    for name, row in stats.items():
        logits = torch.cat([s[name].flatten(0, 1) for s in seen])
        count = [0] * logits.size(1)
        for r in logits.tolist():
            for i in sorted(range(len(r)), key=lambda i: (-r[i], i))[:k]:
                count[i] += 1
        assert row["share"] == pytest.approx([c / (30 * k) for c in count], rel=1e-6) and sum(
            row["share"]
        ) == pytest.approx(1)
        assert row["entropy"] == pytest.approx(
            -sum(c / (30 * k) * math.log(c / (30 * k)) for c in count if c), rel=1e-6
        )


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
