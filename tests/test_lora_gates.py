"""Gates of adapters with branches, the loss that balances them and their statistics, against loops
(promise 15)."""

import itertools
import math

import pytest
import torch
from adapters_by_hand import KE, K, adapted, assert_close, gates_by_hand, ids, normal, router_logits
from helpers import randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import lora
from storage.layout import top_k_mask

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
