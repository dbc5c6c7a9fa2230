"""Plain PyTorch code, Opacus 1.6.0 and torch.func: the ops on activations and on per-sample gradients."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from torch import nn
from torch.func import functional_call, grad, vmap

import dropinf
import dropinf_kernels as ops

# Opacus' hooks on the first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")
EXAMPLES = Path(__file__).resolve().parents[2] / "bench" / "examples"
NAMES = ["ops_on_activations.py", "opacus_grad_sample.py", "functorch_gradients.py"]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def opacus_gradients(model, batch):
    """Parameter name -> per-sample gradient, by Opacus' hooks, which do nothing in eval mode."""
    wrapped = GradSampleModule(model.train(), loss_reduction="sum")
    loss_fn(wrapped, batch).sum().backward()
    found = {name: p.grad_sample for name, p in model.named_parameters()}
    wrapped.to_standard_module().eval()
    model.zero_grad()
    return found


def functorch_gradients(model, batch):
    one = grad(lambda p, x, y: loss_fn(lambda x: functional_call(model, p, (x,)), (x[None], y[None]))[0])
    return vmap(one, in_dims=(None, 0, 0))({n: p.detach() for n, p in model.named_parameters()}, *batch)


ROUTES = {"Opacus": opacus_gradients, "torch.func": functorch_gradients}


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    return model, (torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target))


@pytest.mark.parametrize("name", NAMES)
def test_example_agrees_with_the_compressor_and_is_short(name, capsys):
    path = EXAMPLES / name
    assert len(path.read_text().splitlines()) <= 30
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert not stopped.value.code
    assert "against Compressor" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_example_that_keeps_other_coordinates_fails(name, monkeypatch):
    sketch, linear = ops.sketch, torch.ops.dropinf.compress_linear
    monkeypatch.setattr(ops, "sketch", lambda x, index: sketch(x, (index + 1) % x.shape[-1]))
    monkeypatch.setattr(torch.ops.dropinf, "compress_linear", lambda a, g, i, *rest: linear(a, g, (i + 1) % 32, *rest))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert stopped.value.code


@pytest.mark.parametrize("route", ROUTES)
def test_uncompressed_scores_are_those_of_the_toolkits_gradients(route, record):
    model, (x, y) = digits()
    model, x = model.double(), x.double()
    gradients = ROUTES[route](model, (x[:60], y[:60]))
    flat = torch.cat([gradients[name].flatten(1) for name, _ in model.named_parameters()], 1)
    query, train = flat[:10], flat[10:]
    fisher = train.T @ train / 50
    want = query @ torch.linalg.inv(fisher + 0.1 * fisher.diagonal().mean() * torch.eye(len(fisher))) @ train.T

    c = dropinf.compress(model, [(x[:60], y[:60])], loss_fn, dropinf.Identity())
    got = dropinf.score(c[:10], c[10:], dropinf.build_fisher(c[10:], "joint", 0.1))
    error = float((got - want).abs().max() / want.abs().max())
    record("opacus", f"digits MLP, uncompressed: influence from {route}'s gradients, in float64", agreement=error)
    assert error < 1e-5


@pytest.mark.parametrize("mode", ["flat", "factorized"])
@pytest.mark.parametrize("route", ROUTES)
def test_compressed_gradients_equal_the_compressors(route, mode):
    model, batch = digits()
    compressor = dropinf.Compressor(model, dropinf.Dropout(8, mode=mode), loss_fn)
    want, gradients = compressor.compress([batch]), ROUTES[route](model, batch)
    for name, plan in compressor.layers.items():
        torch.testing.assert_close(
            plan.compress_exact(gradients[plan.parameter]),
            want[name],
            rtol=1e-5,
            atol=1e-7 * float(want.flat.abs().max()),
        )


@pytest.mark.parametrize("route", ROUTES)
def test_speed_and_memory_beside_whole_gradients(route, compare):
    torch.manual_seed(0)

    class Pooled(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean(1)

    model = Pooled(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)).eval()
    batch = torch.randn(8, 128, 768), torch.randint(768, (8,))
    compressor = dropinf.Compressor(model, dropinf.Dropout(64, group=16), loss_fn)

    def theirs():
        gradients = ROUTES[route](model, batch)
        return {n: plan.compress_exact(gradients[plan.parameter]) for n, plan in compressor.layers.items()}

    ours = lambda: compressor.compress([batch])  # noqa: E731
    got, want = ours(), theirs()
    error = max(float((got[n] - want[n]).abs().max() / want[n].abs().max()) for n in want)
    assert error < 1e-5
    compare(
        "opacus",
        f"768 -> 3072 -> 768, 8 x 128 positions, runs of 16, k 64: Compressor against {route} and a gather",
        ours,
        theirs,
        agreement=error,
    )
