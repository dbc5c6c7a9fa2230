"""Exact products: one backward a sample in float64, and the scores of what was not compressed away."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf.workload import map_tensors, unwrap
from tests.api.models import HUGGING_FACE, PLAIN, Lambda, N, build, squared
from tests.directions.cases import MODELS, SKETCHES, assert_near, make, products

WAYS = ("forward", "backward")
# Neither way can differentiate this twice: its backward runs the forward again, outside the graph.
REFUSED = ("checkpoint_reentrant",)
# Forward mode has no weight norm, and forgets an embedding's padding_idx.
BACKWARD_ALONE = ("parametrized", "shared_positions")


def random_direction(model, queries=2, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    named = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
    given = {n: torch.randn(queries, *p.shape, dtype=p.dtype, generator=generator) * scale for n, p in named.items()}
    return dropinf.Direction.dense(given, model)


@pytest.mark.filterwarnings("error::UserWarning:dropinf.*")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [n for n in (*PLAIN, *HUGGING_FACE) if n not in REFUSED])
def test_equals_a_backward_for_each_sample(name, way):
    model, batch, loss_fn = build(name)
    d = random_direction(model)
    expected = products(unwrap(model), loss_fn, batch, d)
    parts = [map_tensors(lambda t, s=s: t[s], batch) for s in (slice(0, 3), slice(3, N))]
    if name in ("shared_positions", "patched"):
        parts = [batch]  # the model knows N
    if way == "forward" and name in BACKWARD_ALONE:
        with pytest.raises(dropinf.AttributionError, match="forward mode"):
            dropinf.rerank(model, parts, d, loss_fn, way=way)
        return
    found = dropinf.rerank(model, parts, d, loss_fn, way=way)
    assert found.dtype == torch.float64
    assert_near(found, expected, 1e-6 if name == "llama" else 1e-10)  # whose norms compute in float32


@pytest.mark.filterwarnings("ignore:rerank")
@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_score_of_the_compressed(name, sketch):
    case = make(name, sketch)
    d = dropinf.direction(case.query, case.fisher, case.compressor)
    found = dropinf.rerank(case.model, [case.batch], d, case.loss_fn)
    assert_near(found, dropinf.score(case.query, case.train, case.fisher), 1e-9)


def state_of(model):
    parameters = [(n, id(p), p.clone(), p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()]
    buffers = [(n, id(b), b.clone()) for n, b in model.named_buffers()]
    flat = [[id(p) for p in m._flat_weights] for m in model.modules() if isinstance(m, nn.RNNBase)]
    return parameters, buffers, [m.training for m in model.modules()], flat, torch.get_rng_state()


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["cnn", "lstm", "tied", "frozen", "gpt2"])
def test_the_model_is_as_it_was(name, way):
    model, batch, loss_fn = build(name)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    if name == "gpt2":
        model.train()  # its dropouts draw
    before = state_of(model)
    dropinf.rerank(model, [batch, batch], random_direction(model), loss_fn, way=way)
    assert_same(state_of(model), before)

    def fails(model, batch):
        loss_fn(model, batch)
        if not torch.is_grad_enabled() or way == "backward":
            raise KeyError("late")
        return loss_fn(model, batch)

    with pytest.raises((KeyError, dropinf.AttributionError), match="late"):
        dropinf.rerank(model, [batch], random_direction(model), fails, way=way)
    assert_same(state_of(model), before)


@pytest.mark.parametrize("way", WAYS)
def test_frozen_parameters_count_where_the_direction_is_on_them(way):
    model, batch, loss_fn = build("frozen")
    given = {n: torch.randn(2, *p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    d = dropinf.Direction.dense(given, model)
    found = dropinf.rerank(model, [batch], d, loss_fn, way=way)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    model.requires_grad_(True)
    assert_near(found, products(model, loss_fn, batch, d), 1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_all_products_see_one_draw_of_dropout(way):
    model, batch, loss_fn = build("sequence_mlp")
    model.insert(2, nn.Dropout(0.5)).train()
    d = random_direction(model, queries=3)
    torch.manual_seed(5)
    found = dropinf.rerank(model, [batch], d, loss_fn, way=way)
    torch.manual_seed(5)
    losses = loss_fn(model, batch)
    expected = torch.zeros(3, N, dtype=torch.float64)
    for n in range(N):
        gradients = torch.autograd.grad(losses[n], list(model.parameters()), retain_graph=True)
        for q in range(3):
            for (name, _), g in zip(model.named_parameters(), gradients, strict=True):
                expected[q, n] += (g * d.tensor(name, q)).sum()
    assert_near(found, expected, 1e-10)


def causal(model, batch):
    return model(batch).square().flatten(1).sum(1)


class Attention(nn.Module):
    """Fused attention, whose kernel in float32 has neither a forward mode nor a second derivative."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["attention", "lstm"])
def test_fused_kernels_of_float32(kind, way):
    model, batch = (Attention(), torch.randn(N, 5, 8)) if kind == "attention" else PLAIN["lstm"]()
    d = random_direction(model)
    expected = products(copy.deepcopy(model).double(), causal, batch.double(), d)
    found = dropinf.rerank(model, [batch], d, causal, way=way)
    assert found.dtype == torch.float32
    assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_directions_of_any_size(dtype, scale, way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 5)).to(dtype)
    given = {n: torch.randn(2, *p.shape) * scale for n, p in model.named_parameters()}
    d = dropinf.Direction.dense(given, model)
    batch = torch.randn(N, 7).to(dtype)
    expected = products(copy.deepcopy(model).double(), squared, batch.double(), d)
    assert_near(dropinf.rerank(model, [batch], d, squared, way=way), expected, 3e-2)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_autocast(way, inside):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(7, 16), nn.GELU(), nn.Linear(16, 5)), torch.randn(N, 7)

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside or torch.is_autocast_enabled("cpu")):
            return squared(model, batch).float()

    d = random_direction(model)
    expected = products(copy.deepcopy(model).double(), squared, batch.double(), d)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        assert_near(dropinf.rerank(model, [batch], d, loss_fn, way=way), expected, 3e-2)


def test_a_zero_direction_gives_zeros():
    model, batch, loss_fn = build("mlp")
    assert not dropinf.rerank(model, [batch], random_direction(model, scale=0.0), loss_fn).any()


def test_a_loss_that_no_parameter_reaches_is_refused():
    model, batch, _ = build("mlp")
    for way in WAYS:
        with pytest.raises(ValueError, match="its losses do not depend on any parameter"):
            dropinf.rerank(model, [batch], random_direction(model), lambda m, b: b.sum(1), way=way)


class Plain(torch.autograd.Function):
    """x squared, without forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class WrongForward(Plain):
    @staticmethod
    def jvp(ctx, x):  # noqa: ARG004
        return x


class Once(Plain):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Cut(Plain):
    """Its backward leaves the graph without a word."""

    @staticmethod
    def backward(ctx, g):
        return (2 * ctx.saved_tensors[0] * g).detach()


def by(function):
    model = Lambda(
        lambda m, x: m.b(function.apply(m.a(x))) + m.c(x), a=nn.Linear(5, 4), b=nn.Linear(4, 3), c=nn.Linear(5, 3)
    )
    return model.double(), torch.randn(N, 5, dtype=torch.float64)


@pytest.mark.parametrize(("function", "why"), [(Plain, "jvp"), (WrongForward, "plain autograd")])
def test_a_model_without_forward_mode_goes_backward(function, why):
    model, batch = by(function)
    d = random_direction(model)
    with pytest.warns(UserWarning, match=rf"rerank: forward mode does not serve.*{why}") as seen:
        found = dropinf.rerank(model, [batch, batch, batch], d, squared)
    assert len(seen) == 1
    assert_near(found, products(model, squared, batch, d).repeat(1, 3), 1e-10)


def test_a_batch_that_forward_mode_is_wrong_for_goes_backward():
    """Forward mode counts padding, which the first batch has none of."""
    model = Lambda(lambda m, ids: m.head(m.tokens(ids)), tokens=nn.Embedding(9, 5, padding_idx=0), head=nn.Linear(5, 3))
    model, batches = model.double(), [torch.randint(1, 9, (N, 6)), torch.randint(0, 2, (N, 6))]
    d = random_direction(model)
    with pytest.warns(UserWarning, match="plain autograd"):
        found = dropinf.rerank(model, batches, d, squared)
    assert_near(found, torch.cat([products(model, squared, batch, d) for batch in batches], 1), 1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_writes_to_its_batch(way):
    model, batch, _ = build("mlp")
    d, before = random_direction(model), batch.clone()
    expected = products(model, squared, batch * 2, d)
    assert_near(dropinf.rerank(model, [batch], d, lambda m, b: squared(m, b.mul_(2)), way=way), expected, 1e-10)
    assert torch.equal(batch, before)


def test_a_weight_that_a_list_holds_goes_backward():
    """What stands in the parameter's place is not what the forward reads."""
    model, batch, loss_fn = build("mlp")
    model.rows = [model[2].weight]
    model.forward = lambda x: torch.tanh(model[0](x)) @ model.rows[0].T
    d = random_direction(model)
    with pytest.warns(UserWarning, match="plain autograd"):
        found = dropinf.rerank(model, [batch], d, loss_fn)
    assert_near(found, products(model, loss_fn, batch, d), 1e-10)


@pytest.mark.filterwarnings("ignore:rerank")
@pytest.mark.parametrize("function", [Once, Cut])
def test_a_model_that_no_way_serves_is_refused(function):
    model, batch = by(function)
    with pytest.raises(dropinf.AttributionError, match=r"plain autograd.*compressed scores"):
        dropinf.rerank(model, [batch], random_direction(model), squared)


@pytest.mark.filterwarnings("ignore:rerank")
def test_a_reentrant_checkpoint_is_refused():
    model, batch, loss_fn = build("checkpoint_reentrant")
    with pytest.raises(dropinf.AttributionError, match="compressed scores"):
        dropinf.rerank(model, [batch], random_direction(model), loss_fn)
