"""TRAK beside our projector: the same scores without compression, dropinf's gradients with it, times and memory."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer, IterativeGradientComputer
from trak.modelout_functions import IterativeImageClassificationModelOutput, TextClassificationModelOutput
from trak.projectors import BasicProjector, NoOpProjector

import dropinf
from dropinf.interop.trak import Projector

SKETCHES = [
    dropinf.Dropout(6),
    dropinf.Dropout(6, mode="flat"),
    dropinf.Dropout(6, keep=0.5),
    dropinf.Dropout(4, rank=8, whiten=True),
    dropinf.Gaussian(5),
]


def margins(model, batch):
    """TRAK's output of an image: the log odds of its label."""
    logits = model(batch[0])
    label = F.one_hot(batch[1], logits.shape[1]).bool()
    return logits[label] - logits.masked_fill(label, -math.inf).logsumexp(1)


def digits(start, stop):
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[start:stop]
    return DataLoader(TensorDataset(torch.tensor(x).float()[order] / 16, torch.tensor(y)[order]), 64)


def mlp(width=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).eval()


@pytest.fixture(scope="module")
def trained():
    """(model, its checkpoints, train, query)."""
    train, query, model, states = digits(0, 400), digits(400, 450), mlp(), []
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(train.dataset.tensors[0]), train.dataset.tensors[1]).backward()
        optimizer.step()
        if step in (29, 59):
            states.append(copy.deepcopy(model.state_dict()))
    return model, states, train, query


def traker(model, folder, projector, n, task="image_classification", **options):
    options = {"lambda_reg": 1e-3, "use_half_precision": False} | options
    return TRAKer(model, task, n, save_dir=str(folder), device="cpu", projector=projector, logging_level=50, **options)


def run(made, states, train, query):
    """TRAK's quickstart: the scores [n, q]."""
    for i, state in enumerate(states):
        made.load_checkpoint(state, model_id=i)
        for batch in train:
            made.featurize(batch, num_samples=len(batch[1]))
    made.finalize_features()
    for i, state in enumerate(states):
        made.start_scoring_checkpoint("query", state, model_id=i, num_targets=len(query.dataset))
        for batch in query:
            made.score(batch, num_samples=len(batch[1]))
    return torch.from_numpy(made.finalize_scores("query").copy())


def stored(made, model_id=0):
    made.saver.load_current_store(model_id)
    return torch.from_numpy(made.saver.current_store["grads"].copy())


def close(found, wanted, rtol=1e-5):
    assert found.shape == wanted.shape
    error = float((found - wanted).norm() / wanted.norm())
    assert error < rtol
    return error


@pytest.mark.parametrize("route", ["projector", "computer", "iterative"])
def test_whole_gradients_give_traks_scores(trained, route, tmp_path, record):
    model, states, train, query = trained
    projector = Projector(model, dropinf.Identity(), scale=1.0)  # NoOpProjector's
    computers = {"projector": FunctionalGradientComputer, "computer": projector.computer()}
    computer = computers.get(route, IterativeGradientComputer)
    options = {"task": IterativeImageClassificationModelOutput()} if route == "iterative" else {}
    ours = traker(model, tmp_path / "ours", projector, 400, gradient_computer=computer, **options)
    theirs = traker(model, tmp_path / "theirs", NoOpProjector(device="cpu"), 400)
    found, wanted = (run(made, states, train, query) for made in (ours, theirs))
    error = close(found, wanted)
    record("traker", f"digits MLP, 2 checkpoints, Identity, {route}", agreement=error)


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
@pytest.mark.parametrize("route", ["projector", "computer", "iterative"])
def test_rows_are_dropinfs(trained, route, sketch, tmp_path):
    model, states, train, query = trained
    compressor = dropinf.Compressor(model, sketch, margins)
    model.load_state_dict(states[0])
    compressor.calibrate(train)
    projector = Projector(model, compressor if compressor._moments.needed else sketch)
    computers = {"projector": FunctionalGradientComputer, "computer": projector.computer()}
    computer = computers.get(route, IterativeGradientComputer)
    options = {"task": IterativeImageClassificationModelOutput()} if route == "iterative" else {}
    ours = traker(model, tmp_path, projector, 400, gradient_computer=computer, **options)
    assert run(ours, states, train, query).isfinite().all()
    for i, state in enumerate(states):
        model.load_state_dict(state)
        close(stored(ours, i), compressor.compress(train).flat, 1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_chosen_parameters(trained, fused, tmp_path):
    model, states, train, query = trained
    names = ["2.weight", "0.bias"]
    projector = Projector(model, dropinf.Dropout(6), grad_wrt=names)
    computer = projector.computer() if fused else FunctionalGradientComputer
    ours = traker(model, tmp_path, projector, 400, grad_wrt=names, gradient_computer=computer)
    run(ours, states[:1], train, query)
    wanted = dropinf.Compressor(model, dropinf.Dropout(6), margins, layers=names).compress(train)
    assert set(wanted.shapes) == {"2", "0.bias"}
    close(stored(ours), wanted.flat, 1e-6)


def test_half_precision_keeps_small_gradients(tmp_path):
    """A model of a million parameters: entries, over their square root, are below the smallest float16."""
    train = digits(0, 64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 10)).eval()
    model[4].weight.data *= 1e-2
    wanted = dropinf.Compressor(model, dropinf.Dropout(16), margins, layers=["2.weight"]).compress(train).flat
    errors = {}
    for scale in (1.0, None):
        projector = Projector(model, dropinf.Dropout(16), scale=scale)
        made = traker(
            model, tmp_path / str(scale), projector, 64, use_half_precision=True, gradient_computer=projector.computer()
        )
        made.load_checkpoint(model.state_dict(), model_id=0)
        for batch in train:
            made.featurize(batch, num_samples=len(batch[1]))
        start = sum(math.prod(plan.stored_shape) for plan in projector.plans[:2])
        assert projector.plans[2].name == "2"
        found = stored(made).float()[:, start : start + 256] * math.sqrt(projector.grad_dim) / projector.scale
        errors[scale] = float((found - wanted).norm() / wanted.norm())
    print(errors)
    assert errors[None] < 2e-3 < 0.05 < errors[1.0]


@pytest.mark.parametrize("fused", [False, True])
def test_finds_the_images_of_the_same_digit(trained, fused, tmp_path, record):
    """TRAK's quickstart, in its default half precision, beside its own projector of equal size."""
    model, states, train, query = trained
    projector = Projector(model, dropinf.Dropout(8))
    computer = projector.computer() if fused else FunctionalGradientComputer
    options = {"use_half_precision": True, "lambda_reg": 10.0}
    ours = traker(model, tmp_path / "ours", projector, 400, gradient_computer=computer, **options)
    theirs = traker(model, tmp_path / "theirs", None, 400, proj_dim=projector.proj_dim, **options)
    assert isinstance(theirs.projector, BasicProjector)
    of_train, of_query = (loader.dataset.tensors[1] for loader in (train, query))
    shares = []
    for made in (ours, theirs):
        best = run(made, states, train, query).topk(5, dim=0).indices
        shares.append(float((of_train[best] == of_query).float().mean()))
    assert shares[0] > max(0.7, shares[1] - 0.1)
    what = f"digits MLP, mask 8x8, {'computer' if fused else 'projector'}: share of one label in the top 5"
    record("traker", f"{what} (BasicProjector: {shares[1]:.2f})", agreement=shares[0])


class Pooled(nn.Module):
    """[N, T, 512] -> [N, 10]."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(512, 1024), nn.Linear(1024, 512), nn.Linear(512, 10)

    def forward(self, x):
        return self.head(self.down(F.gelu(self.up(x))).mean(1))


@pytest.mark.parametrize("half", [False, True])
def test_beside_its_projector_of_equal_size(half, compare, tmp_path):
    torch.manual_seed(0)
    model = Pooled().eval()
    batch = torch.randn(8, 64, 512), torch.randint(10, (8,))
    inds = torch.arange(8).numpy()

    def made(name, projector, **options):
        found = traker(model, tmp_path / name, projector, 8, use_half_precision=half, **options)
        found.load_checkpoint(model.state_dict(), model_id=0)

        def job():
            found.saver.current_store["is_featurized"][:] = 0
            found.featurize(batch, inds=inds)

        return found, job

    sketch = dropinf.Dropout(8, group=8)
    projector = Projector(model, sketch)
    theirs, their_job = made("theirs", None, proj_dim=projector.proj_dim)
    assert isinstance(theirs.projector, BasicProjector)
    wanted = dropinf.Compressor(model, sketch, margins).compress([batch]).flat
    for name, options in {"projector": {}, "computer": {"gradient_computer": projector.computer()}}.items():
        ours, job = made(name, projector, **options)
        job()
        error = close(stored(ours).float(), wanted, 2e-3 if half else 1e-5)
        what = f"featurize(), {'float16' if half else 'float32'}, 512-1024-512-10, 8 x 64 positions, "
        what += f"{projector.proj_dim} values: mask 8x8, {name}, against BasicProjector"
        found = compare("traker", what, job, their_job, 2, agreement=error)
        assert name == "projector" or found["peak_mb"] < 8 * 4 * projector.grad_dim / 1e6 / 3


def test_a_folder_of_another_mask_is_refused_by_trak(trained, tmp_path):
    model = trained[0]
    traker(model, tmp_path, Projector(model, dropinf.Dropout(6)), 400)
    traker(model, tmp_path, Projector(model, dropinf.Dropout(6)), 400)
    with pytest.raises(AssertionError, match="JL matrix"):
        traker(model, tmp_path, Projector(model, dropinf.Dropout(6, seed=1)), 400)


def test_wrong_arguments_are_refused_in_one_line(trained, tmp_path):
    model, states, train, _ = trained
    projector = Projector(model, dropinf.Dropout(6))
    made = traker(model, tmp_path / "a", projector, 400, grad_wrt=["0.weight"])
    made.load_checkpoint(states[0], model_id=0)
    with pytest.raises(ValueError, match=r"^grads have no 0\.bias; give the projector TRAKer's grad_wrt$"):
        made.featurize(next(iter(train)), num_samples=64)
    computer = projector.computer()
    with pytest.raises(ValueError, match=r"^grad_wrt: it is not the projector's; give both the same$"):
        traker(model, tmp_path / "b", projector, 400, grad_wrt=["0.weight"], gradient_computer=computer)
    with pytest.raises(ValueError, match=r"^model: it is not the one that the projector was made with; give both"):
        traker(copy.deepcopy(model), tmp_path / "c", projector, 400, gradient_computer=computer)
    text = TextClassificationModelOutput()
    with pytest.raises(ValueError, match=r"^task: TextClassificationModelOutput has no output of a whole batch; pass"):
        traker(model, tmp_path / "d", projector, 400, task=text, gradient_computer=computer)
    traker(model, tmp_path / "e", projector, 400, task=text, gradient_computer=projector.computer(margins))
    with pytest.raises(RuntimeError, match="needs statistics of the data"):
        Projector(model, dropinf.PCA(4))


def test_versions_are_refused_in_one_line(monkeypatch):
    path = Path(dropinf.__file__).parent / "interop" / "trak.py"
    spec = importlib.util.spec_from_file_location("dropinf.interop.fresh", path)
    for error, found in {
        "traker is not installed; run: pip install traker==0.3.2": importlib.metadata.PackageNotFoundError,
        "traker is 0.2.0; this adapter reaches into that of 0.3.2: pip install traker==0.3.2": "0.2.0",
    }.items():

        def version(_, found=found):
            if isinstance(found, str):
                return found
            raise found

        monkeypatch.setattr("dropinf.interop.version", version)
        with pytest.raises(ImportError) as caught:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert str(caught.value) == error
