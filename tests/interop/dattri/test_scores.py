"""dattri's attributors beside ours: the same scores without compression, dropinf's gradients with it."""

from __future__ import annotations

import pytest
import torch
from dattri import algorithm
from dattri.algorithm import trak
from dattri.task import AttributionTask

import dropinf
from dropinf.interop.dattri import BlockProjectedIFAttributor, TracInAttributor, TRAKAttributor
from tests.interop.dattri.models import (
    NO_GPU,
    SKETCHES,
    WHOLE,
    Odd,
    close,
    columns,
    compressor_of,
    losses,
    mean_loss,
    single,
    stored,
)


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
