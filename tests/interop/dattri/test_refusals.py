"""What dattri's attributors of ours cannot do is said in one line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch
from dattri.task import AttributionTask
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf.interop.dattri import BlockProjectedIFAttributor, TRAKAttributor
from tests.interop.dattri.models import (
    WHOLE,
    Tied,
    losses,
    mean_loss,
    single,
)


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
