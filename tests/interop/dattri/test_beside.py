"""dattri's attributors beside ours at equal size: rank agreement, times and memory."""

from __future__ import annotations

import math

import pytest
import torch
from dattri import algorithm
from dattri.metric import mislabel_detection_auc
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf.interop.dattri import BlockProjectedIFAttributor, TRAKAttributor
from tests.interop.dattri.models import (
    Pooled,
    close,
    columns,
    digits,
    losses,
    mean_loss,
    mlp,
    projections,
    single,
    stored,
)


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
