"""quanda's metrics on our explainer and on its own: the same scores without compression, times and memory."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F

if torch.version.cuda is None:  # PyPI's torchvision is built for CUDA, and cannot be imported without these operators
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from quanda.explainers.wrappers import TRAK, CaptumTracInCP, Kronfluence
from quanda.explainers.wrappers.kronfluence_tasks import ImageClassificationTask
from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import dropinf
from dropinf.interop.quanda import CompressedInfluence

FLIPPED = list(range(0, 300, 10))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, train, query, checkpoint): an MLP on digits, a tenth of whose training labels are wrong."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x).float()[order] / 16, torch.tensor(y)[order]
    query = x[300:330], y[300:330]
    x, y = x[:300], y[:300].clone()
    y[FLIPPED] = (y[FLIPPED] + 1) % 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.003)
    for _ in range(100):
        optimizer.zero_grad()
        loss_fn(model, (x, y)).mean().backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("quanda") / "digits.pt"
    torch.save(model.state_dict(), path)
    return model, TensorDataset(x, y), query, str(path)


def close(found, wanted, rtol=1e-5):
    assert found.shape == wanted.shape
    error = float((found - wanted).norm() / wanted.norm())
    assert error < rtol
    return error


def test_whole_gradients_give_tracins_scores(trained, record):
    model, train, query, checkpoint = trained
    reference = CaptumTracInCP(model, train, checkpoints=[checkpoint], batch_size=64)
    ours = CompressedInfluence(model, train, checkpoints=checkpoint, sketch=dropinf.Identity(), kind=None)
    error = close(ours.explain(*query), reference.explain(*query))
    close(ours.self_influence(), reference.self_influence())
    close(ours.explain(query[0], query[1].tolist()), reference.explain(*query))
    record("quanda", "CaptumTracInCP, digits MLP, 1 checkpoint, Identity", agreement=error)


def test_whole_gradients_give_influence_by_plain_autograd(trained, record):
    """quanda wraps no method with this Fisher matrix: its formula, in float64."""
    model, train, query, _ = trained
    model, (x, y) = copy.deepcopy(model).double(), train.tensors
    query = query[0].double(), query[1]
    sketch = dropinf.Identity()
    ours = CompressedInfluence(model, TensorDataset(x.double(), y), sketch=sketch, kind="joint", damping=0.2)

    def rows(batch):
        losses = loss_fn(model, batch)
        parts = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
        return torch.stack([torch.cat([g.flatten() for g in part]) for part in parts])

    g, q = rows((x.double(), y)), rows(query)
    fisher = g.T @ g / len(g)
    damped = fisher + 0.2 * fisher.diagonal().mean() * torch.eye(len(fisher)).double()
    record(
        "quanda",
        "influence by its formula, digits MLP, Identity, float64",
        agreement=close(ours.explain(*query), q @ torch.linalg.solve(damped, g.T)),
    )
    close(ours.self_influence(), (g * torch.linalg.solve(damped, g.T).T).sum(1))


@pytest.mark.parametrize(
    "sketch", [dropinf.Dropout(6), dropinf.Dropout(4, rank=8, whiten=True)], ids=["mask", "rotated"]
)
def test_rows_are_dropinfs(trained, sketch):
    model, train, query, _ = trained
    ours = CompressedInfluence(model, train, sketch=sketch, batch_size=64)
    batches = [tuple(t[i : i + 64] for t in train.tensors) for i in range(0, 300, 64)]
    compressor = dropinf.Compressor(model, sketch, loss_fn)
    compressor.calibrate(batches)
    wanted = compressor.compress(batches)
    assert torch.equal(ours.train.flat, wanted.flat)
    fisher = dropinf.build_fisher(wanted)
    close(ours.explain(*query), dropinf.score(compressor.compress([query]), wanted, fisher))
    close(ours.self_influence(), dropinf.self_influence(wanted, fisher))
    every = torch.cat([ours.explain(*batch) for batch in batches])
    close(ours.self_influence(), every.diag(), 1e-4)


def explainers(trained, folder):
    """Ours, and quanda's TRAK of the same number of values per sample."""
    model, train, _, checkpoint = trained
    ours = CompressedInfluence(model, train, sketch=dropinf.Dropout(8))
    assert ours.train.flat.shape[1] == 144
    yield "mask 8x8, 144 values", ours
    options = {
        "cache_dir": str(folder),
        "load_from_disk": False,
        "lambda_reg": 100.0,
    }  # the best of 0, 1e-3, 1, 1e2, 1e4
    yield "TRAK, 144 values, its best lambda_reg", TRAK(model, train, model_id="0", proj_dim=144, **options)
    yield "CaptumTracInCP", CaptumTracInCP(model, train, checkpoints=[checkpoint], batch_size=64)


@pytest.mark.filterwarnings("ignore")
def test_metrics_beside_quandas_own_explainers(trained, tmp_path, record):
    model, train, query, _ = trained
    found = {}
    for name, explainer in explainers(trained, tmp_path):
        classes = ClassDetectionMetric(model, train, s=5)
        for part in (slice(0, 15), slice(15, 30)):
            x, y = query[0][part], query[1][part]
            classes.update(explainer.explain(x, y), y)
        flipped = MislabelingDetectionMetric(
            model, train, FLIPPED, precomputed_self_influence=explainer.self_influence(batch_size=64)
        )
        found[name] = classes.compute()["score"], flipped.compute()["score"]
        for metric, value in zip(("class detection", "mislabeling detection"), found[name], strict=True):
            record("quanda", f"{metric}, digits MLP: {name}", agreement=value)
    ours = found["mask 8x8, 144 values"]
    assert ours[0] > 0.7  # of 5 proponents; by chance .1
    assert ours[1] > 0.8  # by chance .5, at most .95


@pytest.mark.filterwarnings("ignore")
def test_a_metric_constructs_it(trained):
    model, train, _, checkpoint = trained
    metric = MislabelingDetectionMetric(
        model,
        train,
        FLIPPED,
        explainer_cls=CompressedInfluence,
        expl_kwargs={"sketch": dropinf.Dropout(16), "batch_size": 100},
        checkpoints=[checkpoint],
    )
    assert metric.compute()["score"] > 0.8


def test_loads_the_last_checkpoint(trained):
    model, train, query, checkpoint = trained
    torch.manual_seed(1)
    fresh = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    ours, same = (
        CompressedInfluence(m, train, checkpoints=c, sketch=dropinf.Dropout(6))
        for m, c in ((fresh, ["", checkpoint]), (model, None))
    )
    assert torch.equal(ours.explain(*query), same.explain(*query))


def test_language_model_on_a_mapping_dataset():
    torch.manual_seed(0)
    size = {"vocab_size": 50, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size)).eval()
    ids = torch.randint(50, (12, 8))
    labels = ids.masked_fill(torch.arange(8) > torch.arange(4, 16).clamp(max=7)[:, None], -100)
    columns = {"input_ids": ids, "attention_mask": (labels >= 0).long(), "labels": labels}
    train = datasets.Dataset.from_dict({name: t.tolist() for name, t in columns.items()}).with_format("torch")
    sketch = dropinf.Dropout(4)
    ours = CompressedInfluence(model, train, task="causal_lm", sketch=sketch, layers="*.mlp.*", batch_size=5)

    def tokens(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
        return losses.view(len(logits), -1).sum(1)

    wanted = dropinf.compress(model, [columns], tokens, sketch, layers="*.mlp.*")
    close(ours.train.flat, wanted.flat)
    scores = ours.explain({name: columns[name][:3] for name in ("input_ids", "attention_mask")}, labels[:3])
    close(scores, dropinf.score(wanted[:3], wanted, ours.fisher))


class Pooled(nn.Module):
    """[N, T, 512] -> [N, 10]."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(512, 1024), nn.Linear(1024, 512), nn.Linear(512, 10)

    def forward(self, x):
        return self.head(torch.relu(self.down(torch.relu(self.up(x)))).mean(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", ["TRAK", "CaptumTracInCP", "Kronfluence"])
def test_beside_quandas_wrappers(compare, tmp_path, other):
    torch.manual_seed(0)
    model, train = Pooled().eval(), TensorDataset(torch.randn(32, 32, 512), torch.randint(10, (32,)))
    query = tuple(t[:8] for t in train.tensors)
    path = tmp_path / "pooled.pt"
    torch.save(model.state_dict(), path)

    def ours():
        return CompressedInfluence(model, train, sketch=dropinf.Dropout(8), batch_size=16).explain(*query)

    def trak():
        options = {"cache_dir": str(tmp_path), "load_from_disk": False, "lambda_reg": 1e-3, "batch_size": 16}
        return TRAK(model, train, model_id="0", proj_dim=216, **options).explain(*query)

    def tracin():
        options = {"loss_fn": nn.CrossEntropyLoss(reduction="sum"), "sample_wise_grads_per_batch": True}
        return CaptumTracInCP(model, train, checkpoints=[str(path)], batch_size=16, **options).explain(*query)

    def kronfluence():
        # its queries must fill a batch
        return Kronfluence(model, ImageClassificationTask(), train, batch_size=8, cache_dir=str(tmp_path)).explain(
            *query
        )

    theirs = {"TRAK": trak, "CaptumTracInCP": tracin, "Kronfluence": kronfluence}[other]
    same = ", of the same size" if other == "TRAK" else ""
    compare(
        "quanda",
        f"constructor and explain of 8; 512-1024-512-10, 32 x 32 positions; mask 8x8, 216 values, against {other}{same}",
        ours,
        theirs,
        rounds=3 if other == "CaptumTracInCP" else 1,
    )


@pytest.mark.filterwarnings("ignore")
def test_self_influence_needs_no_second_pass(trained, compare, tmp_path):
    made = dict(explainers(trained, tmp_path))
    ours, trak = (next(e for name, e in made.items() if name.startswith(start)) for start in ("mask", "TRAK"))
    calls = []
    handle = trained[0].register_forward_hook(lambda *_: calls.append(1))
    ours.self_influence()
    handle.remove()
    assert not calls

    def theirs():
        trak.__dict__.pop("_self_influence_cache", None)
        return trak.self_influence(batch_size=64)

    what = "self-influence of 300 digits, 144 values each: mask 8x8 against TRAK"
    compare("quanda", what, ours.self_influence, theirs)


def test_versions_tasks_and_layers_are_refused_in_one_line(trained, monkeypatch):
    model, train, _, _ = trained
    with pytest.raises(ValueError, match="Task translation not supported by this explainer"):
        CompressedInfluence(model, train, task="translation")
    with pytest.raises(ValueError, match="layers: 'nothing' matches no module or parameter of this model"):
        CompressedInfluence(model, train, layers="nothing")
    with pytest.raises(ValueError, match="BatchNorm '1' is in train mode, so it mixes the samples"):
        CompressedInfluence(nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10)), train)
    path = Path(dropinf.__file__).parent / "interop" / "quanda.py"
    spec = importlib.util.spec_from_file_location("dropinf.interop.fresh", path)
    for error, found in {
        "quanda is not installed; run: pip install quanda==0.5.0": importlib.metadata.PackageNotFoundError,
        "quanda is 0.4.2; this adapter reaches into that of 0.5.0: pip install quanda==0.5.0": "0.4.2",
    }.items():

        def version(_, found=found):
            if isinstance(found, str):
                return found
            raise found

        monkeypatch.setattr("dropinf.interop.version", version)
        with pytest.raises(ImportError) as caught:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert str(caught.value) == error
