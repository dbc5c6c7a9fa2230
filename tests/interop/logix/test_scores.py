"""LogIX (logix-ai 0.1.1): its Hessians and influence scores of gradients that dropinf compressed."""

from __future__ import annotations

import copy
import importlib
from importlib.metadata import PackageNotFoundError

import logix
import pytest
import torch
from logix.config import LoRAConfig
from torch import nn

import dropinf
from dropinf.interop import logix as adapter
from tests.interop.logix.models import (
    batches_of,
    collect,
    digits,
    error_of,
    factors_of,
    loss_fn,
    query_log,
    scores_of,
)

# Its hooks on the first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


@pytest.mark.parametrize("hessian", ["none", "raw", "kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["mlp", "rows", "cnn"])
def test_uncompressed_scores_are_logixs(kind, hessian, record):
    scores = {}
    for name in ("theirs", "ours"):
        model, x, y = digits(kind)
        run = logix.LogIX(f"{kind}-{name}")
        run.watch(model)
        if name == "ours":
            adapter.compress(run, dropinf.Identity())
        collect(run, model, batches_of(x[:48], y[:48]), hessian=hessian)
        scores[name] = scores_of(run, model, x[100:104], y[100:104], precondition=hessian != "none")
        own = run.compute_self_influence(query_log(run, model, x[100:104], y[100:104]), precondition=hessian != "none")
        scores[name] = torch.cat([scores[name], own["influence"][:, None]], 1)
    error = error_of(scores["ours"], scores["theirs"])
    record(
        "logix-ai", f"digits {kind}, uncompressed: its influence and self-influence, hessian {hessian}", agreement=error
    )
    assert error < 1e-5


@pytest.mark.parametrize("hessian", ["raw", "kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["rows", "cnn"])
def test_hessians_are_those_of_the_compressed_space(kind, hessian):
    """Against the formulas, on gradients and factors from plain autograd in float64."""
    model, x, y = digits(kind)
    x, y, qx, qy = x[:48], y[:48], x[100:103], y[100:103]
    run = logix.LogIX("digits")
    run.watch(model)
    compressor = adapter.compress(run, dropinf.Dropout(5))
    collect(run, model, batches_of(x, y), hessian=hessian)
    got = scores_of(run, model, qx, qy)

    model, *_ = digits(kind)  # the hooks of a run stay on its model
    batch = torch.cat([x, qx]), torch.cat([y, qy])
    c = dropinf.Compressor(
        model, dropinf.Dropout(5), loss_fn, layers=[f"{n}.weight" for n in compressor.layers]
    ).compress([batch])
    factors = factors_of(model, compressor, x, y)
    want, damping = 0, None
    for name, layer in reversed(c.layers.items()):
        train, query = layer[:48], layer[48:]
        if hessian == "raw":
            cov = train.flatten(1).T @ train.flatten(1) / 48
            cov += 0.1 * cov.diagonal().mean() * torch.eye(len(cov))
            want = want + query.flatten(1) @ torch.linalg.inv(cov) @ train.flatten(1).T
            continue
        a, g = (torch.linalg.eigh(f.flatten(0, 1).T @ f.flatten(0, 1) / 48) for f in factors[name])
        rotated = [g.eigenvectors.T @ c @ a.eigenvectors for c in (train, query)]
        values = torch.outer(g.eigenvalues, a.eigenvalues) if hessian == "kfac" else rotated[0].square().mean(0)
        damping = 0.1 * values.mean() if damping is None else damping  # the last layer's, for all of them
        want = want + ((rotated[1] / (values + damping)).flatten(1) @ rotated[0].flatten(1).T)
    assert error_of(got, want) < 1e-6


def test_what_does_not_fit_is_one_line():
    model, x, y = digits()
    run = logix.LogIX("empty")
    with pytest.raises(ValueError, match=r"^run: it watches no module; call run\.watch\(model\) first$"):
        adapter.compress(run, dropinf.Dropout(6))

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    other = nn.Sequential(Odd(64, 10)).double()
    run.watch(other)
    with pytest.raises(ValueError, match=r"^compress: module 0 \(Odd\) is not a linear layer or convolution[^\n]*$"):
        adapter.compress(run, dropinf.Dropout(6))

    run = logix.LogIX("lora")
    run.watch(model)
    adapter.compress(run, dropinf.Dropout(6))
    with pytest.raises(ValueError, match=r'^compress: module 0\.logix_lora_B [^\n]*leave lora at "none"$'):
        collect(run, model, batches_of(x[:16], y[:16]), lora="random")

    model, x, y = digits()
    run = logix.LogIX("flat")
    run.watch(model)
    compressor = adapter.compress(run, dropinf.Dropout(6, mode="flat"))
    with pytest.raises(ValueError, match=r'^compress: module 0 has no single input factor[^\n]*"raw"$'):
        collect(run, model, batches_of(x[:16], y[:16]), hessian="kfac")
    with pytest.raises(ValueError, match=r"^compress: its compressor has no loss[^\n]*$"):
        compressor.compress([(x[:4], y[:4])])


def test_wrong_version_and_missing_package_are_one_line(monkeypatch):
    monkeypatch.setattr("dropinf.interop.version", lambda name: "0.2.0")
    with pytest.raises(
        ImportError,
        match=r"^logix-ai is 0\.2\.0; this adapter reaches into that of 0\.1\.1: pip install logix-ai==0\.1\.1$",
    ):
        importlib.reload(adapter)

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("dropinf.interop.version", missing)
    with pytest.raises(ImportError, match=r"^logix-ai is not installed; run: pip install logix-ai==0\.1\.1$"):
        importlib.reload(adapter)


@pytest.mark.parametrize("dim", [16, 64, 256])
def test_speed_and_memory_beside_its_lora(dim, compare):
    class Pooled(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean(1)

    torch.manual_seed(0)
    model = Pooled(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)).eval()
    x, y = torch.randn(8, 128, 768), torch.randint(768, (8,))
    ours, theirs = logix.LogIX("ours"), logix.LogIX("theirs")
    models = copy.deepcopy(model), copy.deepcopy(model)
    ours.watch(models[0])
    adapter.compress(ours, dropinf.Dropout(dim))
    theirs.watch(models[1])
    theirs.add_lora(lora_config=LoRAConfig(rank=dim))

    def step(run, model):
        def job():
            run.setup({"grad": ["log"]})
            with run(data_id=list("abcdefgh")):
                loss_fn(model, (x, y)).sum().backward()

        return job

    jobs = step(ours, models[0]), step(theirs, models[1])
    compare(
        "logix-ai",
        f"768 -> 3072 -> 768, 8 x 128 positions, mask {dim}x{dim} against LoGra",
        *jobs,
        rounds=7,
    )
    want = dropinf.Compressor(model, dropinf.Dropout(dim), loss_fn, layers=["0.weight", "2.weight"]).compress([(x, y)])
    got = ours.get_log()[1]
    assert all(error_of(got[name]["grad"], want[name]) < 1e-5 for name in ("0", "2"))
