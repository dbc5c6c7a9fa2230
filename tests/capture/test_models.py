"""Compressed gradients equal a float64 micro-batch-of-one oracle, for every kind of module and model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropinf
from dropinf.capture.modules import LinearUse
from dropinf.capture.samples import Samples
from dropinf.workload import map_tensors, unwrap
from tests.api.models import HUGGING_FACE, PLAIN, N, build
from tests.api.oracle import assert_equal_gradients, oracle

SKETCHES = {
    "identity": dropinf.Identity(),
    "dropout": dropinf.Dropout(dim=(3, 2)),
    "group": dropinf.Dropout(dim=4, group=4),
    "fold": dropinf.Dropout(dim=2, keep=0.6),
    "scaled": dropinf.Dropout(dim=3, scale=True),
    "flat": dropinf.Dropout(dim=17, mode="flat"),
    "flat_fold": dropinf.Dropout(dim=7, mode="flat", keep=0.4),
    "energy": dropinf.Dropout(dim=3, sampling="energy"),
    "rotated": dropinf.Dropout(dim=2, rank=4),
    "rotated_groups": dropinf.Dropout(dim=2, rank=4, group=2),
    "rotated_fold": dropinf.Dropout(dim=2, rank=4, keep=0.8),
    "whitened": dropinf.Dropout(dim=3, whiten=True),
    "whitened_groups": dropinf.Dropout(dim=4, group=4, whiten=True),
    "whitened_rotated": dropinf.Dropout(dim=2, rank=4, whiten=True),
    "whitened_one_side": dropinf.Dropout(dim=(3, 2), rank=(1, 4), sampling="energy", whiten=True),
    "whitened_gaussian": dropinf.Gaussian(dim=3, whiten=True),
    "whitened_pca": dropinf.PCA(dim=3, whiten=True),
    "rotated_energy": dropinf.Dropout(dim=2, rank=4, sampling="energy"),
    "sjlt": dropinf.SJLT(dim=3),
    "gaussian": dropinf.Gaussian(dim=3),
    "rademacher": dropinf.Rademacher(dim=3),
    "pca": dropinf.PCA(dim=3),
}
TOLERANCE = {"gaussian": 1e-10, "pca": 1e-10}


@pytest.mark.parametrize("name", [*PLAIN, *HUGGING_FACE])
@pytest.mark.parametrize("sketch", ["identity", "dropout", "flat", "gaussian"])
def test_models(name, sketch):
    model, batch, loss_fn = build(name)
    expected = oracle(unwrap(model), loss_fn, batch, N)
    compressor = dropinf.Compressor(model, SKETCHES[sketch], loss_fn)
    assert_equal_gradients(compressor, compressor.compress([batch]), expected)


@pytest.mark.parametrize("name", ["sequence_mlp", "cnn", "attention", "gpt2", "tied", "raw_parameters"])
@pytest.mark.parametrize("sketch", [s for s in SKETCHES if s not in ("identity", "dropout", "flat", "gaussian")])
def test_sketches(name, sketch):
    model, batch, loss_fn = build(name)
    expected = oracle(model, loss_fn, batch, N)
    compressor = dropinf.Compressor(model, SKETCHES[sketch], loss_fn)
    compressor.calibrate([batch])
    assert_equal_gradients(compressor, compressor.compress([batch]), expected)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt2", "shared_positions", "lstm", "bert"])
def test_batch_of_one_then_more(name):
    """A batch of one cannot show what is shared by all samples; the next batch must still be right."""
    model, batch, loss_fn = build(name)
    compressor = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    parts = [map_tensors(lambda t, s=s: t[s], batch) for s in (slice(0, 1), slice(1, 4))]
    assert_equal_gradients(compressor, compressor.compress(parts), oracle(model, loss_fn, batch, N))


def test_nothing_is_silently_left_out():
    for name in PLAIN:
        model, _, loss_fn = build(name)
        compressor = dropinf.Compressor(model, dropinf.Dropout(4), loss_fn, layers=None)
        parameters = {n.replace("_orig_mod.", "") for n, _ in model.named_parameters()}
        assert {x.parameter for x in compressor.layers.values()} | set(
            _parameters_of(model, compressor.skipped)
        ) == parameters


def _parameters_of(model, skipped):
    for name in skipped:
        yield name if name in dict(model.named_parameters()) else f"{name}.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, batch, loss_fn = build("sequence_mlp")
    expected = oracle(model, loss_fn, batch, N)
    compressor = dropinf.Compressor(model.to(dtype), dropinf.Identity(), loss_fn)
    gradients = compressor.compress([batch.to(dtype)])
    assert gradients.dtype == torch.float32
    assert_equal_gradients(compressor, gradients, expected, tolerance=30 * torch.finfo(dtype).eps)


def test_bf16_autocast_is_as_close_as_autograd():
    """The error against float64 is at most twice that of plain autograd under the same autocast."""
    model, batch, loss_fn = build("sequence_mlp")
    expected = oracle(model, loss_fn, batch, N)
    model, batch = model.float(), batch.float()

    def autocast_loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(model, batch).float()

    plain = oracle(model, autocast_loss, batch, N)
    compressor = dropinf.Compressor(model, dropinf.Identity(), autocast_loss)
    gradients = compressor.compress([batch])
    for name, layer in compressor.layers.items():
        exact = expected[layer.parameter]
        error = (gradients[name].reshape(exact.shape).double() - exact).norm()
        theirs = (plain[layer.parameter].double() - exact).norm()
        assert error <= 2 * theirs + 1e-6 * exact.norm(), name


def test_autocast_around_the_call_changes_nothing():
    model, batch, loss_fn = build("sequence_mlp")
    model, batch = model.float(), batch.float()
    compressor = dropinf.Compressor(model, dropinf.Gaussian(3), lambda m, b: loss_fn(m, b).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compressor.compress([batch])

    def autocast_loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(model, batch).float()

    outside = dropinf.Compressor(model, dropinf.Gaussian(3), autocast_loss).compress([batch])
    assert torch.equal(inside.flat, outside.flat)


def test_autocast_around_the_product_alone_changes_nothing():
    """Adapters call a module's use from hooks of their own, wherever their toolkit runs them."""
    torch.manual_seed(0)
    module = nn.Linear(8, 8)
    compressor = dropinf.Compressor(module, dropinf.Dropout(4), lambda m, x: m(x).sum(1), layers=nn.Linear)
    layer = next(layer for layer in compressor.layers.values() if layer.kind == "linear")
    use, samples = LinearUse("", module, layer, None), Samples(3)
    x, g = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    outside = use.emit_weight(layer, use.save(x, g), g, samples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = use.emit_weight(layer, use.save(x, g), g, samples)
    assert torch.equal(inside, outside)


def test_a_tensor_that_only_looks_like_samples():
    """The exact route cuts batches into samples; a tensor of the same length that is no sample must not mislead it."""
    model, x, _ = build("raw_parameters")
    shared = torch.arange(1.0, N + 1, dtype=torch.float64)

    def loss_fn(model, batch):
        return model(batch[0]).square().flatten(1).sum(1) * batch[1].sum()

    compressor = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    rows = [torch.autograd.grad(loss_fn(model, (x, shared))[n], model.position)[0] for n in range(N)]
    got = compressor.compress([(x, shared)])["position"]
    torch.testing.assert_close(got, torch.stack(rows).flatten(1), rtol=1e-10, atol=1e-12)


class Marked(nn.Parameter):
    """A parameter of a class of its own, as quantized ones are."""


def test_another_use_of_a_parameter_of_its_own_class_is_seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].weight = Marked(model[0].weight.detach())

    def loss_fn(model, x):
        return model(x @ model[0].weight).square().sum(1)

    x = torch.randn(5, 4, dtype=torch.float64)
    got = dropinf.compress(model, [x], loss_fn, dropinf.Dropout(4), layers=["0.weight"])
    want = [torch.autograd.grad(loss_fn(model, row[None]).sum(), model[0].weight)[0].flatten() for row in x]
    assert type(model[0].weight) is Marked
    torch.testing.assert_close(got.flat, torch.stack(want))


class Noted(torch.Tensor):
    """An input of a class of its own."""


def test_what_a_model_makes_of_a_tensor_subclass_keeps_its_class():
    model, seen = nn.Linear(4, 3).double(), []

    def loss_fn(model, x):
        seen.append(type(model.weight @ x.mT))
        return model(x).square().sum(1)

    x = torch.randn(5, 4, dtype=torch.float64).as_subclass(Noted)
    dropinf.compress(model, [x], loss_fn, dropinf.Dropout(2))
    assert seen[0] is Noted


class Overwritten(nn.Module):
    """The output of a linear layer is overwritten, through itself and through a view, as inplace=True does."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4, bias=bias), nn.Linear(4, 3, bias=bias)

    def forward(self, x):
        h = self.first(x)
        h.mul_(2.0)
        h.view(-1, 4)[:, 1:].tanh_()
        return self.second(h).relu_()


@pytest.mark.parametrize("shape", [(N, 5), (N, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_output_overwritten_later_has_the_gradient_of_what_it_was(bias, shape):
    torch.manual_seed(0)
    model, x = Overwritten(bias=bias).double(), torch.randn(shape, dtype=torch.float64)

    def loss_fn(model, x):
        return model(x).square().flatten(1).sum(1)

    compressor = dropinf.Compressor(model, dropinf.Gaussian(3), loss_fn)
    assert_equal_gradients(compressor, compressor.compress([x]), oracle(model, loss_fn, x, N))


class FusedRMSNorm(nn.Module):
    """Its output is the second of a function that has two, as fused kernels have."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, eps):
            inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            ctx.save_for_backward(x, weight, inverse)
            return inverse, x * inverse * weight

        @staticmethod
        def backward(ctx, of_inverse, g):
            x, weight, inverse = ctx.saved_tensors
            of_inverse = of_inverse + (g * x * weight).sum(-1, keepdim=True)
            of_x = g * inverse * weight - of_inverse * inverse**3 * x / x.shape[-1]
            return of_x, (g * x * inverse).sum(0), None

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(4)), 1e-6

    def forward(self, x):
        self.inverse, out = self.Function.apply(x, self.weight, self.eps)
        return out


@pytest.mark.parametrize("used", ["both", "the other"])
def test_an_output_among_others_of_its_node(used):
    """``the other``: the module's own output has no gradient, though its node has one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), FusedRMSNorm()).double()

    def loss_fn(model, x):
        out = model(x)
        return model[1].inverse.sum(1) + (out.sin().sum(1) if used == "both" else 0.0)

    x = torch.randn(N, 5, dtype=torch.float64)
    compressor = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    compressed, expected = compressor.compress([x]), oracle(model, loss_fn, x, N)
    assert compressor.layers["1"].route == "hook"
    assert bool(compressed["1"].any()) == (used == "both")
    assert_equal_gradients(compressor, compressed, expected)
