"""captum's classes beside ours: the same scores without compression, dropinf's gradients with it, times and memory."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch
from captum.influence import NaiveInfluenceFunction, TracInCP, TracInCPFastRandProj
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from captum.influence._utils import common
from captum.influence._utils.nearest_neighbors import NearestNeighbors
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf.interop.captum import CompressedInfluenceFunction, CompressedTracInCP

LOSS = nn.CrossEntropyLoss(reduction="none")
RATES = {"early": 0.1, "late": 0.02}


def digits(n=300, queries=20):
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x).float()[order] / 16, torch.tensor(y)[order]
    return TensorDataset(x[:n], y[:n]), (x[n : n + queries], y[n : n + queries])


@pytest.fixture(scope="module")
def trained():
    """(model, train, query, load): an MLP, and what loads its two checkpoints and returns their learning rates."""
    torch.manual_seed(0)
    train, query = digits()
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer, states = torch.optim.Adam(model.parameters(), 0.01), {}
    for step in range(120):
        optimizer.zero_grad()
        LOSS(model(train.tensors[0]), train.tensors[1]).mean().backward()
        optimizer.step()
        states["early" if step < 30 else "late"] = copy.deepcopy(model.state_dict())

    def load(model, checkpoint):
        model.load_state_dict(states[checkpoint])
        return RATES[checkpoint]

    return model, train, query, load


def close(found, wanted, rtol=1e-5):
    assert found.shape == wanted.shape
    error = float((found - wanted).norm() / wanted.norm())
    assert error < rtol
    return error


def barrier():
    """A model whose Hessian is its empirical Fisher matrix: the loss -log(w x) has gradient -x / wx, Hessian xx^T / (wx)^2."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double()
    model.weight.data.uniform_(0.1, 1)
    model.bias.data.uniform_(0.1, 1)
    x = torch.rand(40, 6, dtype=torch.float64)
    return model, TensorDataset(x, torch.zeros(40)), (torch.rand(7, 6, dtype=torch.float64), torch.zeros(7))


def negative_log(out, _):
    return -out.squeeze(1).log()


@pytest.mark.filterwarnings("ignore:Since `loss_fn` has no")
@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        (NaiveInfluenceFunction, {}),
        (ArnoldiInfluenceFunction, {"arnoldi_dim": 8, "arnoldi_tol": 0.0}),  # all 7 directions: it drops the last one
    ],
)
def test_whole_gradients_give_captums_influence(theirs, options, record):
    model, train, query = barrier()
    regularization = 0.25  # captum rounds it to float32
    arguments = {"loss_fn": negative_log, "batch_size": 9, "checkpoints_load_func": lambda *_: 1.0}
    reference = theirs(
        model, train, "", **arguments, **options, projection_dim=7, hessian_reg=regularization, hessian_inverse_tol=0.0
    )
    ours = CompressedInfluenceFunction(
        model,
        train,
        "",
        **arguments,
        sketch=dropinf.Identity(),
        kind="joint",
        damping=regularization / 40,
        absolute=True,
    )
    error = close(ours.influence(query), reference.influence(query))
    close(ours.self_influence(), reference.self_influence())
    close(ours.self_influence(inputs_dataset=query), reference.self_influence(query))
    for proponents in (True, False):
        found, wanted = (f.influence(query, k=3, proponents=proponents) for f in (ours, reference))
        assert torch.equal(found.indices, wanted.indices)
        close(found.influence_scores, wanted.influence_scores)
    record("captum", f"{theirs.__name__}, loss whose Hessian is the Fisher matrix, Identity", agreement=error)


def test_whole_gradients_give_tracins_scores(trained, record):
    model, train, query, load = trained
    arguments = {"checkpoints_load_func": load, "loss_fn": LOSS, "batch_size": 64}
    reference = TracInCP(model, train, ["early", "late"], **arguments)
    ours = CompressedTracInCP(model, train, ["early", "late"], **arguments, sketch=dropinf.Identity())
    error = close(ours.influence(query), reference.influence(query))
    close(ours.influence(query, aggregate=True), reference.influence(query, aggregate=True))
    close(ours.self_influence(), reference.self_influence())
    close(ours.self_influence(inputs=query), reference.self_influence(query))
    for proponents in (True, False):
        found, wanted = (f.influence(query, k=5, proponents=proponents) for f in (ours, reference))
        assert torch.equal(found.indices, wanted.indices)
        close(found.influence_scores, wanted.influence_scores)
    rows = ours.compute_intermediate_quantities(query)
    close(rows @ ours.train.flat.T, ours.influence(query))
    close(ours.compute_intermediate_quantities(query, aggregate=True), rows.sum(0, keepdim=True))
    record("captum", "TracInCP, digits MLP, 2 checkpoints, Identity", agreement=error)


def test_captums_quantities_are_not_its_scores(trained):
    """Why ours take the root: captum multiplies by the learning rate on both sides."""
    model, train, query, load = trained
    one = TracInCP(model, train, ["late"], checkpoints_load_func=load, loss_fn=LOSS, batch_size=64)
    products = one.compute_intermediate_quantities(query) @ one.compute_intermediate_quantities(train.tensors).T
    close(products, one.influence(query) * RATES["late"])


@pytest.mark.parametrize("sketch", [dropinf.Dropout(6), dropinf.Dropout(4, rank=8, whiten=True)], ids=str)
def test_rows_are_dropinfs(trained, sketch):
    model, train, query, load = trained
    load(model, "late")
    ours = CompressedInfluenceFunction(model, train, "late", load, loss_fn=LOSS, batch_size=64, sketch=sketch)
    batches = list(DataLoader(train, 64))
    compressor = dropinf.Compressor(model, sketch, lambda model, batch: LOSS(model(batch[0]), batch[1]))
    compressor.calibrate(batches)
    wanted = compressor.compress(batches)
    assert torch.equal(ours.train.flat, wanted.flat)
    fisher = dropinf.build_fisher(wanted)
    close(ours.compute_intermediate_quantities(train.tensors), fisher.whiten(wanted).flat / len(train) ** 0.5)
    scores = dropinf.score(compressor.compress([query]), wanted, fisher) / len(train)
    close(ours.influence(query), scores)
    close(common._influence_helper_intermediate_quantities_influence_function(ours, query, False), scores, 1e-4)
    total = ours.compute_intermediate_quantities(query, aggregate=True)
    close(total @ ours.compute_intermediate_quantities(train.tensors).T, scores.sum(0, keepdim=True), 1e-4)


def test_tracin_keeps_dropinfs_rows_of_every_checkpoint(trained):
    model, train, _, load = trained
    sketch = dropinf.Dropout(6)
    ours = CompressedTracInCP(model, train, ["early", "late"], load, loss_fn=LOSS, batch_size=64, sketch=sketch)
    for i, name in enumerate(["early", "late"]):
        rate = load(model, name)
        found = dropinf.compress(model, [train.tensors], lambda m, b: LOSS(m(b[0]), b[1]), sketch)
        for layer in found.shapes:
            torch.testing.assert_close(ours.train[f"{i}/{layer}"], found[layer] * rate**0.5)


def test_hessian_data_test_loss_and_layers(trained):
    model, train, query, load = trained
    part = TensorDataset(*(t[:100] for t in train.tensors))
    smoothed = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.5)
    arguments = {"layers": ["2"], "loss_fn": LOSS, "batch_size": 64, "hessian_dataset": part, "test_loss_fn": smoothed}
    ours = CompressedInfluenceFunction(model, train, "late", load, **arguments, sketch=dropinf.Identity())
    assert list(ours.train.shapes) == ["2", "2.bias"]
    rows, small = (
        dropinf.compress(model, [d.tensors], lambda m, b: LOSS(m(b[0]), b[1]), dropinf.Identity(), layers="2.*")
        for d in (train, part)
    )
    queries = dropinf.compress(model, [query], lambda m, b: smoothed(m(b[0]), b[1]), dropinf.Identity(), layers="2.*")
    wanted = dropinf.score(queries, rows, dropinf.build_fisher(small)) / 100
    close(ours.influence(query), wanted)
    close(ours.influence(query, k=1).influence_scores, wanted.amax(1, keepdim=True))
    train_rows = ours.compute_intermediate_quantities(train.tensors)
    close(ours.compute_intermediate_quantities(query, test=True) @ train_rows.T, wanted, 1e-4)


def test_without_a_loss_the_outputs_are_summed_as_captum_does(trained):
    model, train, query, load = trained
    arguments = {"checkpoints_load_func": load, "batch_size": 64}
    reference = TracInCP(model, train, ["late"], **arguments)
    ours = CompressedTracInCP(model, train, ["late"], **arguments, sketch=dropinf.Identity())
    close(ours.influence(query), reference.influence(query))


def test_ranks_as_the_hessian_does(trained, record):
    """The Fisher matrix is not the Hessian, so the last layer's scores only rank alike."""
    model, train, query, load = trained
    arguments = {"layers": ["2"], "loss_fn": LOSS, "batch_size": 64, "checkpoints_load_func": load}
    regularization, size = 10.0, 250
    reference = NaiveInfluenceFunction(
        model, train, "early", **arguments, projection_dim=size, hessian_reg=regularization, hessian_inverse_tol=0.0
    )
    for sketch in (dropinf.Identity(), dropinf.Dropout(8)):
        options = {"sketch": sketch, "kind": "joint", "damping": regularization / len(train), "absolute": True}
        ours = CompressedInfluenceFunction(model, train, "early", **arguments, **options)
        found, wanted = ours.influence(query).flatten(), reference.influence(query).flatten()
        rank = float(spearmanr(found, wanted).statistic)
        assert rank > 0.3
        record("captum", f"NaiveInfluenceFunction, digits MLP's last layer, {sketch}, Spearman", agreement=rank)


def test_finds_flipped_labels(trained):
    _, train, _, _ = trained
    torch.manual_seed(0)
    x, y = train.tensors
    flipped = torch.zeros(len(y), dtype=torch.bool).index_fill_(0, torch.randperm(len(y))[:30], True)
    noisy = TensorDataset(x, torch.where(flipped, (y + 1) % 10, y))
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        LOSS(model(x), noisy.tensors[1]).mean().backward()
        optimizer.step()
    ours = CompressedInfluenceFunction(
        model, noisy, "", lambda *_: 1.0, loss_fn=LOSS, batch_size=64, sketch=dropinf.Dropout(16)
    )
    assert roc_auc_score(flipped, ours.self_influence()) > 0.9


class Pooled(nn.Module):
    """[N, T, 512] -> [N, classes]."""

    def __init__(self, width=1024, classes=10, last=512):
        super().__init__()
        self.up, self.down, self.head = (
            nn.Linear(512, width),
            nn.Linear(width, last),
            nn.Linear(last, classes, bias=False),
        )

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))).mean(1))


def sequences(n, length, classes=10):
    torch.manual_seed(0)
    return TensorDataset(torch.randn(n, length, 512), torch.randint(classes, (n,)))


class Kept(NearestNeighbors):
    """In the place of captum's default, which needs a package of its own and builds trees: rows are kept as they are."""

    def setup(self, data):
        self.data = data

    def get_nearest_neighbors(self, query, k):
        raise NotImplementedError


def test_beside_tracin(compare):
    torch.manual_seed(0)
    model, train = Pooled(), sequences(32, 64)
    query = tuple(t[:8] for t in train.tensors)
    arguments = {"checkpoints_load_func": lambda *_: 1.0, "batch_size": 8}
    summed = {"loss_fn": nn.CrossEntropyLoss(reduction="sum"), "sample_wise_grads_per_batch": True}

    def ours():
        made = CompressedTracInCP(model, train, [""], **arguments, loss_fn=LOSS, sketch=dropinf.Dropout(64))
        return made.influence(query)

    def theirs():
        return TracInCP(model, train, [""], **arguments, **summed).influence(query)

    assert torch.corrcoef(torch.stack([ours().flatten(), theirs().flatten()]))[0, 1] > 0.9
    what = "constructor and influence of 8 queries; 512-1024-512, 32 x 64 positions; mask 64x64 against TracInCP, its fast route"
    compare("captum", what, ours, theirs)


def test_beside_random_projections_of_equal_size(compare):
    torch.manual_seed(0)
    model, train = Pooled(classes=1000, last=1024), sequences(256, 8, 1000)
    arguments = {"checkpoints_load_func": lambda *_: 1.0, "batch_size": 64}
    summed = nn.CrossEntropyLoss(reduction="sum")

    def theirs(train=train, dim=1024):
        options = {"projection_dim": dim, "nearest_neighbors": Kept(), "loss_fn": summed}
        made = TracInCPFastRandProj(model, model.head, train, [""], **options, **arguments)
        return made._influence(tuple(t[:8] for t in train.tensors))

    def ours(train=train, sketch=None):
        options = {"layers": ["head"], "loss_fn": LOSS, "sketch": sketch or dropinf.Dropout(32)}
        made = CompressedTracInCP(model, train, [""], **options, **arguments)
        assert sketch or made.train.flat.shape[1] == 1024
        return made.influence(tuple(t[:8] for t in train.tensors))

    model.double()  # captum's products of a million terms are good to 2e-4 in float32
    wide = TensorDataset(train.tensors[0].double(), train.tensors[1])
    error = close(ours(wide, dropinf.Identity()), theirs(wide, None))
    model.float()
    what = "last layer 1024-1000, 256 samples, 1024 values each: mask 32x32 against TracInCPFastRandProj"
    compare("captum", what, ours, theirs, agreement=error)


def test_beside_arnoldi_of_equal_size(compare):
    torch.manual_seed(0)
    model, train = Pooled(), sequences(32, 16)
    query = tuple(t[:8] for t in train.tensors)
    arguments = {"checkpoints_load_func": lambda *_: 1.0, "batch_size": 8, "loss_fn": LOSS}

    def ours():
        made = CompressedInfluenceFunction(model, train, "", **arguments, sketch=dropinf.Dropout(2))
        assert made.train.flat.shape[1] == 16
        return made.influence(query)

    def theirs():
        made = ArnoldiInfluenceFunction(
            model, train, "", **arguments, projection_dim=16, arnoldi_dim=16, hessian_inverse_tol=-1.0
        )
        return made.influence(query)

    what = "constructor and influence of 8 queries; 512-1024-512, 32 x 16 positions, 16 values each: mask 2x2 against Arnoldi of 16 steps"
    compare("captum", what, ours, theirs, rounds=3)


def test_versions_and_layers_are_refused_in_one_line(trained, monkeypatch):
    model, train, _, load = trained
    arguments = {"checkpoints_load_func": load, "batch_size": 64}
    with pytest.raises(ValueError, match=r"layers: '1\.\*' matches no module or parameter of this model"):
        CompressedTracInCP(model, train, ["late"], layers=["1"], loss_fn=LOSS, **arguments)
    summed = {"loss_fn": nn.CrossEntropyLoss(reduction="sum"), "sample_wise_grads_per_batch": True}
    with pytest.raises(ValueError, match="loss_fn has reduction='sum'; it must be 'none'"):
        CompressedInfluenceFunction(model, train, "late", **summed, **arguments)
    path = Path(dropinf.__file__).parent / "interop" / "captum.py"
    spec = importlib.util.spec_from_file_location("dropinf.interop.fresh", path)
    for error, found in {
        "captum is not installed; run: pip install captum==0.9.0": importlib.metadata.PackageNotFoundError,
        "captum is 0.8.0; this adapter reaches into that of 0.9.0: pip install captum==0.9.0": "0.8.0",
    }.items():

        def version(_, found=found):
            if isinstance(found, str):
                return found
            raise found

        monkeypatch.setattr("dropinf.interop.version", version)
        with pytest.raises(ImportError) as caught:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert str(caught.value) == error
