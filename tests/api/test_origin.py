"""Gradients know the model and the loss that made them, and those of different models are not scored together."""

from __future__ import annotations

import copy
import functools
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf.gradients import Gradients
from dropinf.loss_name import name_of_loss
from tests.index.fixtures import make_fixtures as made

FIXTURES = Path(__file__).parents[1] / "index" / "fixtures"


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> dropinf.Compressor:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return dropinf.Compressor(model, dropinf.Dropout(3), loss_fn)


def batches(dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=g).to(dtype), torch.randint(3, (4,), generator=g)) for _ in range(3)]


def step(compressor: dropinf.Compressor) -> None:
    with torch.no_grad():
        compressor.model[2].bias[1] += 1e-3


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_of_another_model_are_refused(on_disk, tmp_path):
    compressor = make()
    train = compressor.compress(batches(), **({"out": tmp_path / "idx", "fisher": "block"} if on_disk else {}))
    fisher = dropinf.build_fisher(train)
    same = make().compress(batches())
    step(compressor)
    other = compressor.compress(batches())
    for query, kind in ((other, "dot"), (other, "influence"), (make(1).compress(batches()), "cosine")):
        for options in ({}, {"top": 2}):
            with pytest.raises(ValueError, match=r"query and train are of different models.*other_model=True"):
                dropinf.score(query, train, fisher, kind=kind, **options)
            dropinf.score(query, train, fisher, kind=kind, other_model=True, **options)
    dropinf.score(same, train, fisher)
    dropinf.score(train, same, fisher)
    half = make(dtype=torch.bfloat16).compress(batches(torch.bfloat16))
    with pytest.raises(ValueError, match=r"\(or of another dtype\)"):
        dropinf.score(half, train, kind="dot")


def test_an_origin_stays(tmp_path):
    rows = make().compress(batches())
    assert rows.origin is not None
    assert rows.origin.loss.startswith(f"{__name__}.loss_fn ")
    rows.save(tmp_path / "rows.safetensors")
    fisher = dropinf.build_fisher(rows)
    index = make().compress(batches(), out=tmp_path / "idx")
    copies = [rows[1:3], rows[[2, 0]], rows.to(torch.float64), Gradients.cat([rows, rows]), fisher.solve(rows)]
    copies += [fisher.whiten(rows), pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows), index, index[:2]]
    copies += [part for _, part in index.blocks(5)] + [Gradients.load(tmp_path / "rows.safetensors")]
    assert [x.origin for x in copies] == [rows.origin] * len(copies)
    with pytest.raises(ValueError, match=r"parts\[0\] and parts\[1\] are of different models: the weights"):
        Gradients.cat([rows, make(1).compress(batches())])
    unknown = Gradients(rows.flat, rows.shapes, rows.digest)
    assert Gradients.cat([rows, unknown]).origin is None
    dropinf.score(unknown, rows, kind="dot")


def test_buffers_are_no_weights():
    """Some models count their calls."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    compressor = dropinf.Compressor(Counting(), dropinf.Dropout(3), loss_fn)
    dropinf.score(compressor.compress(batches()), compressor.compress(batches()), kind="dot")


def test_an_index_of_the_first_version_has_no_origin(tmp_path):
    data, folder = made.Data(FIXTURES), shutil.copytree(FIXTURES / "float32", tmp_path / "idx")
    index = dropinf.Index.open(folder)
    assert index.origin is None
    dropinf.score(data.query(), index, kind="dot")


class Loss:
    def __call__(self, model, batch):
        return loss_fn(model, batch)


def test_names_of_losses():
    def smooth(model, batch, *, smoothing=0.1):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=smoothing)

    bound = [functools.partial(smooth, smoothing=x) for x in (0.1, 0.2)]
    scripted = eval("lambda model, batch: None")
    found = [name_of_loss(x) for x in (smooth, *bound, Loss(), Loss().__call__, loss_fn, scripted, len)]
    assert len(set(found)) == len(found)
    assert found[3].startswith(f"{__name__}.Loss ")
    assert name_of_loss(functools.partial(smooth, smoothing=0.1)) == found[1]
    assert name_of_loss(functools.partial(smooth, smoothing=object())) == name_of_loss(
        functools.partial(smooth, smoothing=object())
    )


class Other(nn.Tanh):
    """A class of one's own."""


def test_gradients_of_other_classes_are_not_scored_together():
    query, train = make(), make()
    query.model[1] = Other()
    query = dropinf.Compressor(query.model, dropinf.Dropout(3), loss_fn).compress(batches())
    train = train.compress(batches())
    with pytest.raises(
        ValueError, match="the weights are the same, and the classes or constants of modules are others"
    ):
        dropinf.score(query, train, kind="dot")
    assert dropinf.score(query, train, kind="dot", other_model=True).shape == (12, 12)
    weights = train.origin.model.partition("+")[0]  # as earlier versions knew it
    earlier = Gradients(train.flat, train.shapes, train.digest, (weights, train.origin.loss))
    assert dropinf.score(query, earlier, kind="dot").shape == (12, 12)
