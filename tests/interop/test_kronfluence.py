"""kronfluence beside dropinf: equal scores where the definitions are equal, its factors on compressed gradients, times."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path

import kronfluence
import pytest
import torch
import torch.nn.functional as F
from kronfluence.module import TrackedModule
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import dropinf
from bench.fidelity.kronfluence_reference import pairwise_scores
from dropinf.interop.kronfluence import CompressGradients, prepare_model

gc.collect()
gc.freeze()  # kronfluence collects garbage at every step: seconds, beside all that is imported here
STRATEGIES = ["identity", "diagonal", "kfac", "ekfac"]
pytestmark = pytest.mark.filterwarnings("ignore")


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Task(kronfluence.Task):
    def compute_train_loss(self, batch, model, sample=False):
        return loss_fn(model, batch).sum()

    def compute_measurement(self, batch, model):
        return loss_fn(model, batch).sum()


class Sequences(nn.Module):
    """[N, T, 12] -> [N, 5]."""

    def __init__(self, bias=False):
        super().__init__()
        self.up, self.down = nn.Linear(12, 9, bias=bias), nn.Linear(9, 5, bias=bias)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x))).mean(1)


class Convolution(nn.Module):
    """[N, 3, 6, 6] -> [N, 5]."""

    def __init__(self, bias=False):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=bias)
        self.head = nn.Linear(8, 5, bias=bias)

    def forward(self, x):
        return self.head(torch.tanh(self.convolution(x)).mean((2, 3)))


def problem(kind, bias=False):
    torch.manual_seed(0)
    model = (Sequences if kind == "linear" else Convolution)(bias).double().eval()
    shape = (3, 12) if kind == "linear" else (3, 6, 6)
    train, query = ((torch.randn(n, *shape).double(), torch.randint(5, (n,))) for n in (40, 7))
    return model, train, query


def close(found, wanted, rtol=1e-5):
    assert found.shape == wanted.shape
    error = float((found - wanted).norm() / wanted.norm())
    assert error < rtol
    return error


def analyze(model, task, train, query, strategy="ekfac", **score_options):
    """kronfluence in its own words."""
    with tempfile.TemporaryDirectory() as folder:
        analyzer = kronfluence.Analyzer("own", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        arguments = kronfluence.FactorArguments(strategy=strategy, use_empirical_fisher=True)
        analyzer.fit_all_factors("f", TensorDataset(*train), per_device_batch_size=8, factor_args=arguments)
        options = {"per_device_query_batch_size": len(query[0]), "per_device_train_batch_size": 8}
        scores = kronfluence.ScoreArguments(damping_factor=None, **score_options)
        sets = TensorDataset(*query), TensorDataset(*train)
        analyzer.compute_pairwise_scores("s", "f", *sets, **options, score_args=scores)
        return analyzer.load_pairwise_scores("s")["all_modules"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_gradients_give_its_scores(strategy, kind, bias, record):
    model, train, query = problem(kind, bias)
    wanted = pairwise_scores(model, loss_fn, train, query, strategy=strategy)
    assert wanted.shape == (7, 40)
    error = close(pairwise_scores(model, loss_fn, train, query, strategy=strategy, sketch=dropinf.Identity()), wanted)
    if bias:
        record("kronfluence", f"{strategy}, {kind} and bias, prepare_model with Identity, float64", agreement=error)


def test_reference_is_kronfluence_in_its_own_words():
    model, train, query = problem("linear", bias=True)
    model.float()
    train, query = ((x.float(), y) for x, y in (train, query))
    before = copy.deepcopy(model.state_dict())
    found = pairwise_scores(model, loss_fn, TensorDataset(*train), query, batch_size=16)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, TrackedModule) for module in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    close(found, analyze(kronfluence.prepare_model(model, Task()), Task(), train, query), 1e-4)


SKETCHES = {"mask": dropinf.Dropout(4), "fold": dropinf.Dropout(3, keep=0.7), "whole": dropinf.Identity()}


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("name", SKETCHES)
def test_equals_dropinfs_scores_where_definitions_agree(kind, name, record):
    """Dot products and the diagonal Fisher matrix, with a damping of 0.1 of its mean, are defined alike."""
    (model, train, query), sketch = problem(kind), SKETCHES[name]
    compressor = dropinf.Compressor(model, sketch, loss_fn)
    c, q = compressor.compress([train]), compressor.compress([query])
    dot = pairwise_scores(model, loss_fn, train, query, strategy="identity", sketch=sketch, batch_size=64)
    close(dot, dropinf.score(q, c, kind="dot"), 1e-12)
    diagonal = pairwise_scores(model, loss_fn, train, query, strategy="diagonal", sketch=sketch)
    error = close(diagonal, dropinf.score(q, c, dropinf.build_fisher(c, "diagonal", 0.1)), 1e-12)
    fixed = pairwise_scores(model, loss_fn, train, query, strategy="diagonal", sketch=sketch, damping=0.01)
    close(fixed, dropinf.score(q, c, dropinf.build_fisher(c, "diagonal", 0.01, absolute=True)), 1e-12)
    record("kronfluence", f"dropinf's diagonal Fisher, {kind}, {name}, float64", agreement=error)


def test_ekfac_agrees_with_dropinfs_where_lengths_are_equal(record):
    """One position, inputs and output gradients of length 1: then mean C C^T is the covariance of output gradients, and
    mean C^T C that of inputs, which is how dropinf and kronfluence define their factors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5, bias=False)).double()

    def linear(model, batch):
        return (model(batch[0]) * batch[1]).sum(1)

    data = (F.normalize(torch.randn(60, size).double(), dim=1) for size in (8, 5))
    query = tuple(torch.randn(7, size).double() for size in (8, 5))
    train = tuple(data)
    c, q = (dropinf.compress(model, [x], linear, dropinf.Identity()) for x in (train, query))
    found = dropinf.score(q, c, dropinf.build_fisher(c, "kronecker", 0.1))
    error = close(found, pairwise_scores(model, linear, train, query))
    record("kronfluence", "dropinf's EK-FAC, equal lengths, Identity, float64", agreement=error)


def test_ekfac_differs_from_dropinfs_by_its_factors_alone():
    """kronfluence's factors are the second moments of single positions, (a, 1) and g; dropinf's those of whole per-sample
    gradients. In its bases, the eigenvalues, their mean that damping is a share of, and the scores are the same."""
    model, train, query = problem("linear")
    found = {}
    for name, batch in {"train": train, "query": query}.items():
        inputs, outputs = {}, {}

        def note(layer, args, out, inputs=inputs, outputs=outputs):
            out.retain_grad()
            inputs[layer], outputs[layer] = args[0].detach(), out

        handles = [layer.register_forward_hook(note) for layer in (model.up, model.down)]
        loss_fn(model, batch).sum().backward()
        found[name] = {layer: (inputs[layer], outputs[layer].grad) for layer in inputs}
        for handle in handles:
            handle.remove()
    total = torch.zeros(7, 40).double()
    for layer, (a, g) in found["train"].items():
        bases = [torch.linalg.eigh(x.flatten(0, 1).T @ x.flatten(0, 1)).eigenvectors for x in (g, a)]
        rotated = [
            bases[0].T @ torch.einsum("nto,nti->noi", g, a) @ bases[1]
            for a, g in (found["train"][layer], found["query"][layer])
        ]
        values = rotated[0].square().mean(0)
        total += (rotated[1] / (values + 0.1 * values.mean())).flatten(1) @ rotated[0].flatten(1).T
    close(pairwise_scores(model, loss_fn, train, query), total)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_dropinfs(kind, bias):
    """[k_out, k_in] as dropinf compresses them, and a last column for the bias."""
    model, train, _ = problem(kind, bias)
    sketch = dropinf.Dropout(4)
    compressor = dropinf.Compressor(model, sketch, loss_fn)
    calibrated = dropinf.Compressor(model, dropinf.Dropout(3, rank=6, whiten=True), loss_fn)
    calibrated.calibrate([train])
    whole = dropinf.compress(model, [train], loss_fn, dropinf.Identity())
    for plan, wanted in ((sketch, compressor), (compressor.layers, compressor), (calibrated.layers, calibrated)):
        prepared, c = prepare_model(copy.deepcopy(model), Task(), plan), wanted.compress([train])
        modules = {m.name: m for m in prepared.modules() if isinstance(m, TrackedModule)}
        seen = {}

        def note(module, args, out, seen=seen):
            seen[module.name] = args[0].detach(), out
            out.retain_grad()

        for module in modules.values():
            module.register_forward_hook(note)
        loss_fn(prepared, (train[0].clone().requires_grad_(), train[1])).sum().backward()
        for name, module in modules.items():
            a, out = seen[name]
            found = module.compute_per_sample_gradient(input_activation=a, output_gradient=out.grad)
            close(found[:, :, : c.shapes[name][1]], c[name])
            if bias:
                column = wanted.layers[name].out_axis.apply(whole[f"{name}.bias"])
                close(found[:, :, -1], column)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("strategy", ["identity", "diagonal"])
def test_documented_hook_gives_the_same(strategy, kind):
    class Compressed(CompressGradients, Task):
        layers = None

    model, train, query = problem(kind, bias=True)
    model.float()
    train, query = ((x.float(), y) for x, y in (train, query))
    task = Compressed()
    task.layers = dropinf.Compressor(model, dropinf.Dropout(4), loss_fn).layers
    wanted = analyze(prepare_model(copy.deepcopy(model), Task(), dropinf.Dropout(4)), Task(), train, query, strategy)
    found = analyze(kronfluence.prepare_model(model, task), task, train, query, strategy)
    close(found, wanted)


def test_other_scores_of_compressed_gradients():
    """Self-influence, summed queries, low rank and scores per token take the same route."""
    model, train, query = problem("linear", bias=True)
    model.float()
    train, query = ((x.float(), y) for x, y in (train, query))
    prepared = prepare_model(copy.deepcopy(model), Task(), dropinf.Dropout(4))
    pairs = analyze(prepared, Task(), train, query)
    close(analyze(prepared, Task(), train, query, aggregate_query_gradients=True), pairs.sum(0, keepdim=True))
    close(analyze(prepared, Task(), train, query, compute_per_token_scores=True).sum(2), pairs)
    close(analyze(prepared, Task(), train, query, query_gradient_low_rank=4, use_full_svd=True), pairs, 0.3)
    every = analyze(prepared, Task(), train, train)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = kronfluence.Analyzer("own", prepared, Task(), cpu=True, disable_tqdm=True, output_dir=folder)
        arguments = kronfluence.FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        analyzer.fit_all_factors("f", TensorDataset(*train), per_device_batch_size=8, factor_args=arguments)
        for measured in (False, True):
            scores = kronfluence.ScoreArguments(damping_factor=None, use_measurement_for_self_influence=measured)
            options = {"per_device_train_batch_size": 8, "score_args": scores, "overwrite_output_dir": True}
            analyzer.compute_self_scores(f"s{measured}", "f", TensorDataset(*train), **options)
            close(analyzer.load_self_scores(f"s{measured}")["all_modules"], every.diag())


def test_ranks_as_its_own_ekfac_does_on_digits(record):
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x).float()[order] / 16, torch.tensor(y)[order]
    train, query = (x[:300], y[:300]), (x[300:330], y[300:330])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.003)
    for _ in range(60):
        optimizer.zero_grad()
        loss_fn(model, train).mean().backward()
        optimizer.step()
    wanted = pairwise_scores(model, loss_fn, train, query)
    ranks = {}
    for name, sketch in {"Identity": dropinf.Identity(), "mask 16x16": dropinf.Dropout(16)}.items():
        c, q = (dropinf.compress(model, [batch], loss_fn, sketch) for batch in (train, query))
        found = {
            f"dropinf's EK-FAC, {name}": dropinf.score(q, c, dropinf.build_fisher(c, "kronecker", 0.1)),
            f"its own EK-FAC, {name}": pairwise_scores(model, loss_fn, train, query, sketch=sketch),
        }
        for what, scores in found.items():
            ranks[what] = float(spearmanr(scores.flatten(), wanted.flatten()).statistic)
            record("kronfluence", f"Spearman with its EK-FAC, digits MLP: {what}", agreement=ranks[what])
    assert ranks["its own EK-FAC, Identity"] > 0.9999
    assert ranks["dropinf's EK-FAC, Identity"] > 0.5
    assert min(ranks.values()) > 0.3


class Pooled(nn.Module):
    """[N, T, 512] -> [N, 10]."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(512, 1024), nn.Linear(1024, 512), nn.Linear(512, 10)

    def forward(self, x):
        return self.head(torch.relu(self.down(torch.relu(self.up(x)))).mean(1))


@pytest.mark.parametrize(
    "case",
    [
        "its own EK-FAC, mask 64x64",
        "dropinf's EK-FAC, mask 64x64",
        "its own EK-FAC, mask 64x64, against query gradients of rank 3",
    ],
)
def test_beside_whole_gradients(compare, case):
    torch.manual_seed(0)
    model, train = Pooled().eval(), (torch.randn(64, 32, 512), torch.randint(10, (64,)))
    query = tuple(t[:8] for t in train)
    low_rank = {"query_gradient_low_rank": 3} if "rank" in case else {}  # 4608 values of a 1024 x 512 layer
    whole = kronfluence.prepare_model(copy.deepcopy(model), Task())
    masked = prepare_model(copy.deepcopy(model), Task(), dropinf.Dropout(64))

    def theirs():
        return analyze(whole, Task(), train, query, **low_rank)

    def ours():
        if case.startswith("its"):
            return analyze(masked, Task(), train, query)
        compressor = dropinf.Compressor(model, dropinf.Dropout(64), loss_fn)
        c = compressor.compress([tuple(t[i : i + 8] for t in train) for i in range(0, 64, 8)])
        return dropinf.score(compressor.compress([query]), c, dropinf.build_fisher(c, "kronecker", 0.1))

    assert ours().shape == (8, 64)
    compare(
        "kronfluence",
        f"factors and scores of 8; 512-1024-512-10, 64 x 32 positions: {case}",
        ours,
        theirs,
        rounds=3,
    )


def test_versions_sketches_and_layers_are_refused_in_one_line(monkeypatch):
    model, _, _ = problem("linear")
    calibrated, flat = dropinf.Dropout(4, whiten=True), dropinf.Dropout(4, mode="flat")
    with pytest.raises(ValueError, match=r"needs statistics of the data: calibrate a dropinf.Compressor on the model"):
        prepare_model(copy.deepcopy(model), Task(), calibrated)
    with pytest.raises(ValueError, match="masks flattened gradients"):
        prepare_model(copy.deepcopy(model), Task(), flat)
    part = dropinf.Compressor(model, dropinf.Dropout(4), loss_fn, layers="up.*").layers
    with pytest.raises(
        ValueError, match="layer down is tracked by kronfluence, and not one of the layers with two axes: up"
    ):
        prepare_model(copy.deepcopy(model), Task(), part)

    with pytest.raises(ValueError, match="model is one Linear; kronfluence wraps layers within a model"):
        prepare_model(nn.Linear(3, 2), Task(), dropinf.Dropout(2))

    class Other(nn.Linear):
        pass

    class TrackedOther(type(kronfluence.prepare_model(copy.deepcopy(model), Task()).up), module_type=Other):
        pass

    try:
        with pytest.raises(ValueError, match="layer 0: no sketch for a TrackedOther; leave it untracked"):
            prepare_model(nn.Sequential(Other(3, 2)), Task(), dropinf.Dropout(2))
    finally:
        TrackedModule.SUPPORTED_MODULES.pop(Other)
    path = Path(dropinf.__file__).parent / "interop" / "kronfluence.py"
    spec = importlib.util.spec_from_file_location("dropinf.interop.fresh", path)
    for error, found in {
        "kronfluence is not installed; run: pip install kronfluence==1.0.1": importlib.metadata.PackageNotFoundError,
        "kronfluence is 0.1.1; this adapter reaches into that of 1.0.1: pip install kronfluence==1.0.1": "0.1.1",
    }.items():

        def version(_, found=found):
            if isinstance(found, str):
                return found
            raise found

        monkeypatch.setattr("dropinf.interop.version", version)
        with pytest.raises(ImportError) as caught:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert str(caught.value) == error
