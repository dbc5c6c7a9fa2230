"""What torch makes by default elsewhere ("meta" has no values) has no part in rows, masks, files or scores."""

from __future__ import annotations

import pytest
import torch

import dropinf
from tests.index.small import KINDS, loss_fn, make_batches, make_model

SKETCHES = [dropinf.Dropout(6), dropinf.Gaussian(2), dropinf.SJLT(2), dropinf.PCA(2), dropinf.Dropout(2, rank=3)]


def everything(folder, sketch, model, batches, dtype) -> list[torch.Tensor]:
    compressor = dropinf.Compressor(model, sketch, loss_fn)
    compressor.calibrate(batches)
    rows = compressor.compress(batches)
    order = list(range(len(rows)))[::-1]
    index = compressor.compress(batches, out=folder, dtype=dtype, ids=lambda b: ["é"] * len(b[0]), order=order)
    again = dropinf.Index.open(folder)
    compressor.load(folder / "sketch.safetensors")
    assert index.verify() == []
    assert again.ids([1, -1]) == ["é", "é"]
    found = [rows.flat, again[:].flat, again[[3, 1]].flat, *(part.flat for _, part in again.blocks(7))]
    for kind in KINDS:
        fisher = dropinf.build_fisher(again, kind)
        found += [dropinf.self_influence(again, fisher), dropinf.score(rows, again, fisher)]
        found += dropinf.score(rows, again, fisher, top=3)
        found += dropinf.score(rows.to(torch.float32), again, fisher, kind="dot", top=3)
    again.save_fisher(fisher)
    again.whitened(folder / "rows.npy")
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8])
@pytest.mark.parametrize("sketch", SKETCHES, ids=repr)
def test_the_default_device_has_no_part(sketch, dtype, tmp_path):
    model, batches = make_model(), make_batches()
    wanted = everything(tmp_path / "a", sketch, model, batches, dtype)
    torch.set_default_device("meta")
    try:
        found = everything(tmp_path / "b", sketch, model, batches, dtype)
    finally:
        torch.set_default_device(None)
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
