"""dattri's attributors beside ours: the same scores without compression, dropinf's gradients with it, times and memory."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dattri import algorithm
from dattri.algorithm import trak
from dattri.metric import mislabel_detection_auc
from dattri.task import AttributionTask
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf.interop.dattri import BlockProjectedIFAttributor, TracInAttributor, TRAKAttributor

WHOLE = {"device": "cpu", "proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}
SKETCHES = [
    dropinf.Dropout(6),
    dropinf.Dropout(6, mode="flat"),
    dropinf.Dropout(6, keep=0.5, scale=True),
    dropinf.Dropout(4, rank=8, whiten=True),
    dropinf.Gaussian(5),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """dattri writes batch_metadata.json into the working directory, and reads it back."""
    monkeypatch.chdir(tmp_path)


def digits(start, stop, flipped=0):
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[start:stop]
    y = torch.tensor(y)[order]
    y[:flipped] = (y[:flipped] + 1) % 10
    return TensorDataset(torch.tensor(x).float()[order].view(-1, 1, 8, 8) / 16, y)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean_loss(model, batch, device):
    return losses(model, batch).mean()


def mlp(data, steps=60):
    """A model and its state dicts, early and late."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    optimizer, states = torch.optim.Adam(model.parameters(), 0.01), []
    for step in range(steps):
        optimizer.zero_grad()
        losses(model, data.tensors).mean().backward()
        optimizer.step()
        if step + 1 in (steps // 2, steps):
            states.append(copy.deepcopy(model.state_dict()))
    return model, states


@pytest.fixture(scope="module")
def trained():
    """(model, its checkpoints, train, query)."""
    data, query = digits(0, 200), digits(200, 230)
    return *mlp(data), DataLoader(data, 64), DataLoader(query, 16)


def single(model):
    """dattri's loss of one sample, functional in the parameters, and the probability of its label."""

    def loss(params, sample):
        out = functional_call(model, params, (sample[0][None],))
        return F.cross_entropy(out, sample[1][None])

    return loss, lambda params, sample: torch.exp(-loss(params, sample))


def close(found, wanted, rtol=1e-5):
    assert found.shape == wanted.shape
    error = float((found - wanted).norm() / wanted.norm())
    assert error < rtol
    return error


def compressor_of(model, sketch, batches):
    compressor = dropinf.Compressor(model, sketch, losses)
    compressor.calibrate(batches)
    return compressor


def stored(attributor):
    found = attributor.offload_manager.cached_gradients
    return torch.cat([found[i] for i in sorted(found)])


def columns(gradients, names):
    """dropinf's rows in the order of these layers or parameters."""
    return torch.cat([gradients[name].flatten(1) for name in names], 1)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="dattri pins memory, which needs a GPU")


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize("offload", ["none", "cpu", pytest.param("disk", marks=NO_GPU)])
@pytest.mark.parametrize("hessian", ["Identity", "eFIM"])
def test_whole_gradients_give_block_projected_scores(trained, hessian, offload, record, tmp_path):
    model, states, train, query = trained
    # damping 1: at .1, the inverse that dattri forms in float32 is good to 2e-5.
    options = {"hessian": hessian, "offload": offload, "damping": 1.0}
    task = AttributionTask(mean_loss, model, states[-1])
    reference = algorithm.BlockProjectedIFAttributor(
        task, sparsifier_kwargs=WHOLE, projector_kwargs=WHOLE, cache_dir=str(tmp_path / "theirs"), **options
    )
    ours = BlockProjectedIFAttributor(task, sketch=dropinf.Identity(), cache_dir=str(tmp_path / "ours"), **options)
    for attributor in (reference, ours):
        attributor.cache(train)
    error = close(ours.attribute(train, query), reference.attribute(train, query))
    close(ours.compute_self_attribution(), reference.compute_self_attribution())
    if offload == "none":
        record("dattri", f"BlockProjectedIFAttributor, {hessian}, digits MLP, Identity", agreement=error)


@pytest.fixture(scope="module")
def doubled(trained):
    model, states, train, query = trained
    double = lambda loader: DataLoader(  # noqa: E731
        TensorDataset(loader.dataset.tensors[0].double(), loader.dataset.tensors[1]), loader.batch_size
    )
    return copy.deepcopy(model).double(), states, double(train), double(query)


@pytest.mark.parametrize("layer_name", [None, ["3.bias", "1.weight"]])
def test_whole_gradients_give_traks_scores(doubled, layer_name, record):
    model, states, train, query = doubled
    loss, probability = single(model)
    task = AttributionTask(loss, model, states)
    options = {"layer_name": layer_name, "regularization": 1e-3}
    reference = algorithm.TRAKAttributor(task, probability, {"proj_type": "identity"}, **options)
    ours = TRAKAttributor(task, probability, sketch=dropinf.Identity(), **options)
    for attributor in (reference, ours):
        attributor.cache(train)
    error = close(ours.attribute(query), reference.attribute(query))
    for attributor in (reference, ours):
        attributor.full_train_dataloader = None  # self_attribute does not read what is cached
    close(ours.self_attribute(train), reference.self_attribute(train))
    if layer_name is None:
        record("dattri", "TRAKAttributor, digits MLP, 2 checkpoints, Identity, float64", agreement=error)


@pytest.mark.parametrize("layer_name", [None, "3.weight"])
@pytest.mark.parametrize("normalized", [False, True])
def test_whole_gradients_give_tracins_scores(doubled, normalized, layer_name, record):
    model, states, train, query = doubled
    task = AttributionTask(single(model)[0], model, states)
    rates = torch.tensor([0.1, 0.02])
    names = [layer_name] if layer_name else None  # dattri reads a string letter by letter
    reference = algorithm.TracInAttributor(task, rates, normalized, {"proj_type": "identity"}, names)
    ours = TracInAttributor(task, rates, normalized, sketch=dropinf.Identity(), layer_name=layer_name)
    error = close(ours.attribute(train, query), reference.attribute(train, query))
    close(ours.self_attribute(train), reference.self_attribute(train))
    if layer_name is None and not normalized:
        record("dattri", "TracInAttributor, digits MLP, 2 checkpoints, Identity, float64", agreement=error)


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
def test_block_projected_rows_are_dropinfs(trained, sketch):
    model, states, train, query = trained
    compressor = compressor_of(model, sketch, train)
    chosen = compressor if compressor._moments.needed else sketch
    ours = BlockProjectedIFAttributor(AttributionTask(mean_loss, model, states[-1]), sketch=chosen, damping=0.1)
    ours.cache(train)
    names = ["1", "1.bias", "3", "3.bias"]
    close(stored(ours), columns(compressor.compress(train), names), 1e-6)
    rows, _ = ours._compute_test_gradients(query)
    close(rows, columns(compressor.compress(query), names), 1e-6)


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
def test_trak_and_tracin_rows_are_dropinfs(doubled, sketch):
    model, states, train, query = doubled
    compressor = compressor_of(model, sketch, train)
    chosen = compressor if compressor._moments.needed else sketch
    loss, probability = single(model)
    wanted = columns(compressor.compress(train), ["1", "1.bias", "3", "3.bias"])
    target = columns(compressor.compress(query), ["1", "1.bias", "3", "3.bias"])

    ours = TRAKAttributor(AttributionTask(loss, model, states[-1]), probability, sketch=chosen, regularization=1e-2)
    ours.cache(train)
    rows = wanted / sum(p.numel() for p in model.parameters()) ** 0.5
    kernel = rows.T @ rows + 1e-2 * torch.eye(rows.shape[1])
    close(ours.inv_XTX_XT_list[0], torch.linalg.solve(kernel, rows.T))

    dot = TracInAttributor(AttributionTask(loss, model, states[-1]), [1.0], False, sketch=chosen)
    close(dot.attribute(train, query), (wanted @ target.T).float())


def test_traks_default_stays_dattris(doubled):
    """dattri's constructors change a default in place: theirs, made after ours, must still project."""
    model, states, *_ = doubled
    loss, probability = single(model)
    before = dict(trak.DEFAULT_PROJECTOR_KWARGS)
    TRAKAttributor(AttributionTask(loss, model, states), probability, sketch=dropinf.Dropout(4))
    assert before == trak.DEFAULT_PROJECTOR_KWARGS


class Odd(nn.Module):
    """Positions in two dimensions, a layer that is called twice, and one that is not called."""

    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.twice, self.never = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)

    def inner(self, x):
        return torch.tanh(self.twice(x))

    def forward(self, x):
        x = x.view(-1, 2, 4, 8)
        for _ in range(2):
            x = checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("context", ["plain", "checkpointed", "bfloat16", "autocast"])
def test_layers_called_twice_or_not_at_all(trained, context):
    _, _, train, _ = trained
    torch.manual_seed(0)
    model = Odd(context == "checkpointed").eval()
    if context == "bfloat16":
        model = model.bfloat16()

    def each(model, batch):
        x = batch[0].to(next(model.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=context == "autocast"):
            return losses(model, (x, batch[1])).float()

    task = AttributionTask(lambda model, batch, _: each(model, batch).mean(), model, model.state_dict())
    names = ["twice", "never", "head"]
    ours = BlockProjectedIFAttributor(task, names, sketch=dropinf.Dropout(5), hessian="Identity")
    ours.cache(train)
    compressor = dropinf.Compressor(model, dropinf.Dropout(5), each, layers=["twice", "head"])
    wanted = columns(compressor.compress(train), ["twice", "twice.bias", "head"])
    close(stored(ours), wanted, 1e-6 if context in ("plain", "checkpointed") else 1e-2)


def test_finds_flipped_labels_as_in_dattris_example(record):
    """dattri's examples/noisy_label_detection and examples/pretrained_benchmark/logra_mnist_mlp_lds.py, on digits."""
    data = digits(0, 300, flipped=30)
    model, states = mlp(data)
    train = DataLoader(data, 64)
    loss, probability = single(model)
    ours = BlockProjectedIFAttributor(
        AttributionTask(mean_loss, model, states[-1]), sketch=dropinf.Dropout(16), damping=0.1
    )
    ours.cache(train)
    assert ours.attribute(train, DataLoader(digits(300, 320), 8)).shape == (300, 20)
    trak = TRAKAttributor(
        AttributionTask(loss, model, states), probability, sketch=dropinf.Dropout(16), regularization=1e-3
    )
    scores = {
        "BlockProjectedIFAttributor": ours.compute_self_attribution(),
        "TRAKAttributor": trak.self_attribute(train).flatten(),
    }
    for name, found in scores.items():
        auc, _ = mislabel_detection_auc(found, torch.arange(30))
        assert auc > 0.9
        record(
            "dattri", f"{name}, digits MLP, mask 16x16: AUC of its own metric for flipped labels", agreement=float(auc)
        )


class Pooled(nn.Module):
    """[N, T, 512] -> [N, 512]."""

    def __init__(self, bias):
        super().__init__()
        self.up, self.down = nn.Linear(512, 2048, bias=bias), nn.Linear(2048, 512, bias=bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x))).mean(1)


def projections(kind, dim):
    stages = {"sparsifier_kwargs": WHOLE | {"proj_dim": dim, "proj_type": kind}, "projector_kwargs": WHOLE}
    return stages | {"hessian": "Identity", "offload": "none"}  # without its second stage


@pytest.mark.parametrize("kind", ["random_mask", "normal"])
@pytest.mark.parametrize("bias", [False, True])
def test_beside_its_projections_of_equal_size(bias, kind, compare):
    torch.manual_seed(0)
    model = Pooled(bias).eval()
    train = DataLoader(TensorDataset(torch.randn(16, 128, 512), torch.randint(512, (16,))), 8)
    task = AttributionTask(mean_loss, model, model.state_dict())
    sketches = {"ours": dropinf.Dropout(64), "runs": dropinf.Dropout(64, group=16)}
    options = {"hessian": "Identity", "offload": "none"}
    made = {
        name: BlockProjectedIFAttributor(task, sketch=sketch, cache_dir=name, **options)
        for name, sketch in sketches.items()
    }
    made["theirs"] = algorithm.BlockProjectedIFAttributor(task, cache_dir="theirs", **projections(kind, 64))
    for attributor in made.values():
        attributor.cache(train)
    assert made["theirs"].layer_dims == [64 * 64] * 2
    assert made["ours"].layer_dims == [64 * 64 + 64 * bias] * 2
    wanted = dropinf.Compressor(model, sketches["runs"], losses).compress(train)
    close(stored(made["runs"]), columns(wanted, wanted.shapes))
    for name in ("ours", "runs"):
        what = f"cache(), 512-2048-512 {'with biases' if bias else 'without biases'}, 16 x 128 positions: mask 64x64"
        what += f"{', runs of 16,' if name == 'runs' else ''} against {kind}"
        compare("dattri", what, lambda n=name: made[n].cache(train), lambda: made["theirs"].cache(train), 9)


@pytest.mark.parametrize("kind", ["random_mask", "normal"])
def test_compression_alone_beside_its_compressor(kind, compare):
    """Of one layer, 512 -> 2048 with a bias, on the same inputs and output gradients."""
    torch.manual_seed(0)
    model = Pooled(True).eval()
    train = DataLoader(TensorDataset(torch.randn(8, 256, 512), torch.randint(512, (8,))), 8)
    task = AttributionTask(mean_loss, model, model.state_dict())
    x, g = torch.randn(8, 256, 512), torch.randn(8, 256, 2048)
    reference = algorithm.BlockProjectedIFAttributor(task, ["up"], **projections(kind, 64))
    reference.cache(train)
    their = reference.compressors[0]

    def theirs():
        ones = torch.ones(8, 256, 1)
        return their.forward(g, torch.cat([x, ones], -1))  # as dattri's hook does

    theirs()
    for sketch in (dropinf.Dropout(64), dropinf.Dropout(64, group=16)):
        attributor = BlockProjectedIFAttributor(task, ["up"], sketch=sketch)
        use = attributor.compressors[0]
        ours = lambda use=use: use.compress(use.save(x, g), g)  # noqa: E731
        rows, plans = 8 * torch.einsum("bto,bti->boi", g, x), attributor.compressor.layers
        wanted = [plans["up"].compress_exact(rows).flatten(1), plans["up.bias"].compress_exact(8 * g.sum(1))]
        close(ours(), torch.cat(wanted, 1))
        name = f"mask 64x64{', runs of 16,' if sketch.group > 1 else ''}"
        compare("dattri", f"compression alone, 512-2048, 8 x 256 positions: {name} against {kind}", ours, theirs, 41)


@pytest.mark.parametrize("kind", ["random_mask", "normal"])
def test_trak_beside_its_projections_of_equal_size(kind, compare):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    train, query = DataLoader(digits(0, 32), 16), DataLoader(digits(32, 48), 16)
    loss, probability = single(model)
    task = AttributionTask(loss, model, model.state_dict())
    ours = TRAKAttributor(task, probability, sketch=dropinf.Dropout(8), regularization=1e-3)
    size = sum(math.prod(plan.stored_shape) for plan in ours.compressor.layers.values())
    theirs = algorithm.TRAKAttributor(task, probability, regularization=1e-3)
    theirs.projector_kwargs = {"proj_dim": size, "proj_max_batch_size": 32, "proj_type": kind, "device": "cpu"}
    for attributor in (ours, theirs):
        attributor.cache(train)
        assert attributor.inv_XTX_XT_list[0].shape == (size, 32)
        assert attributor.attribute(query).shape == (32, 16)
    what = f"TRAK, cache(), MLP 64-512-512-10, 32 samples, {size} values: mask 8x8 against {kind}"
    compare("dattri", what, lambda: ours.cache(train), lambda: theirs.cache(train), 3)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv, self.attention = nn.Conv1d(8, 8, 1), nn.MultiheadAttention(8, 1)
        self.second.weight = self.first.weight


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("norm", "LayerNorm"),
        ("conv", "Conv1d"),
        ("second", "Linear"),
        ("first", "Linear"),
        ("attention.out_proj", "NonDynamicallyQuantizableLinear"),
    ],
)
def test_other_layers_are_refused_in_one_line(name, kind):
    model = Tied()
    task = AttributionTask(mean_loss, model, model.state_dict())
    with pytest.raises(ValueError, match=rf"^layer_names: {name} \({kind}\) is not a linear layer, .*; leave it out$"):
        BlockProjectedIFAttributor(task, [name], sketch=dropinf.Dropout(4))


def test_wrong_arguments_are_refused_in_one_line(trained):
    model, states, train, _ = trained
    task = AttributionTask(mean_loss, model, states[-1])
    with pytest.raises(ValueError, match=r"^layers: 'absent' matches no module or parameter of this model"):
        BlockProjectedIFAttributor(task, "absent", sketch=dropinf.Dropout(4))
    with pytest.raises(ValueError, match=r"^projector_kwargs is \{.*\}; the sketch takes its place: leave it out$"):
        BlockProjectedIFAttributor(task, sketch=dropinf.Dropout(4), projector_kwargs=WHOLE)
    with pytest.raises(RuntimeError, match="needs statistics of the data"):
        BlockProjectedIFAttributor(task, sketch=dropinf.PCA(4))
    one = dropinf.Compressor(model, dropinf.Dropout(4), losses, layers=["1.weight"])
    loss, probability = single(model)
    with pytest.raises(ValueError, match=r"^layer_name: 1.bias is not a parameter that the compressor tracks"):
        TRAKAttributor(AttributionTask(loss, model, states), probability, sketch=one)
    found = TRAKAttributor(AttributionTask(loss, model, states), probability, sketch=dropinf.Dropout(4))
    with pytest.raises(RuntimeError, match=r"^this compressor has no loss: dattri's task has it"):
        found.compressor.compress(train)


def test_a_batch_that_fails_leaves_no_hook(trained):
    model, states, *_ = trained
    wrong = DataLoader(TensorDataset(torch.zeros(4, 1, 8, 7), torch.zeros(4, dtype=torch.int64)), 4)
    task = AttributionTask(mean_loss, model, states[-1])
    ours = BlockProjectedIFAttributor(task, sketch=dropinf.Dropout(4), hessian="Identity", cache_dir="wrong")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ours.cache(wrong)
    assert not any("_original_forward" in vars(module) for module in model.modules())


def test_versions_are_refused_in_one_line(monkeypatch):
    path = Path(dropinf.__file__).parent / "interop" / "dattri.py"
    spec = importlib.util.spec_from_file_location("dropinf.interop.fresh", path)
    for error, found in {
        "dattri is not installed; run: pip install dattri==0.3.0": importlib.metadata.PackageNotFoundError,
        "dattri is 0.2.0; this adapter reaches into that of 0.3.0: pip install dattri==0.3.0": "0.2.0",
    }.items():

        def version(_, found=found):
            if isinstance(found, str):
                return found
            raise found

        monkeypatch.setattr("dropinf.interop.version", version)
        with pytest.raises(ImportError) as caught:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert str(caught.value) == error
