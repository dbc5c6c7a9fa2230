"""A compressor from the folder of an index: it compresses queries as the rows were, without the sketch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf


def make_model(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3)).eval()


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture
def batches():
    return [(torch.randn(4, 5), torch.randint(0, 3, (4,))) for _ in range(3)]


SKETCHES = {
    "dropout": dropinf.Dropout(3),
    "energy": dropinf.Dropout(2, sampling="energy", whiten=True),
    "rotated": dropinf.Dropout(2, rank=4),
    "flat": dropinf.Dropout(7, mode="flat"),
    "pca": dropinf.PCA(2),
    "identity": dropinf.Identity(),
}


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("layers", [None, ["0", "3.bias"], ["0.weight"]])
def test_queries_are_compressed_as_the_rows_were(tmp_path, batches, name, layers):
    made = dropinf.Compressor(make_model(), SKETCHES[name], loss_fn, layers=layers)
    made.calibrate(batches)
    made.compress(batches, out=tmp_path / "idx")
    found = dropinf.Compressor.from_index(tmp_path / "idx", make_model(), loss_fn)
    assert list(found.layers) == list(made.layers)
    assert found.digest() == made.digest()
    assert torch.equal(found.compress(batches).flat, made.compress(batches).flat)
    assert set(found.skipped) == set(made.skipped)
    assert found.sketch is None


def test_it_adds_to_the_index(tmp_path, batches):
    dropinf.Compressor(make_model(), dropinf.Dropout(3), loss_fn).compress(batches[:2], out=tmp_path / "idx")
    found = dropinf.Compressor.from_index(tmp_path / "idx", make_model(), loss_fn)
    index = found.compress(batches[2:], out=tmp_path / "idx", append=True)
    assert torch.equal(index[8:].flat, found.compress(batches[2:]).flat)


def test_frozen_layers_are_those_of_the_index(tmp_path, batches):
    """What requires a gradient now says nothing of what the index was made of."""
    dropinf.Compressor(make_model(), dropinf.Dropout(3), loss_fn).compress(batches, out=tmp_path / "idx")
    model = make_model()
    model[0].requires_grad_(False)
    assert "0" in dropinf.Compressor.from_index(tmp_path / "idx", model, loss_fn).layers


def test_another_model_is_refused_by_layer(tmp_path, batches):
    dropinf.Compressor(make_model(), dropinf.Dropout(3), loss_fn).compress(batches, out=tmp_path / "idx")
    with pytest.raises(ValueError, match="of another model: layer 0 is 7 x 5 here and 6 x 5 there"):
        dropinf.Compressor.from_index(tmp_path / "idx", make_model(7), loss_fn)
    with pytest.raises(ValueError, match="layer 1: this model does not track it"):
        dropinf.Compressor.from_index(tmp_path / "idx", nn.Sequential(nn.Linear(5, 6)), loss_fn)


def test_other_weights_are_refused(tmp_path, batches):
    """Gradients of other weights would score without a word."""
    dropinf.Compressor(make_model(), dropinf.Dropout(3), loss_fn).compress(batches, out=tmp_path / "idx")
    model = make_model()
    with torch.no_grad():
        model[0].bias[2] += 1e-3
    with pytest.raises(ValueError, match="its weights are not those that"):
        dropinf.Compressor.from_index(tmp_path / "idx", model, loss_fn)


def test_damaged_masks_are_refused(tmp_path, batches):
    dropinf.Compressor(make_model(), dropinf.Dropout(3), loss_fn).compress(batches, out=tmp_path / "idx")
    path = tmp_path / "idx" / "sketch.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"sketch\.safetensors: damaged"):
        dropinf.Compressor.from_index(tmp_path / "idx", make_model(), loss_fn)


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index"):
        dropinf.Compressor.from_index(tmp_path, make_model(), loss_fn)


def test_an_open_index_serves_as_well(tmp_path, batches):
    made = dropinf.Compressor(make_model(), dropinf.Dropout(3), loss_fn)
    index = made.compress(batches, out=tmp_path / "idx")
    assert dropinf.Compressor.from_index(index, make_model(), loss_fn).digest() == made.digest()


def test_it_keeps_what_calibration_found_and_calibrates_no_more(tmp_path, batches):
    made = dropinf.Compressor(make_model(), dropinf.PCA(2, whiten=True), loss_fn)
    made.calibrate(batches)
    made.save(tmp_path / "masks.safetensors")
    found = dropinf.Compressor.from_masks(tmp_path / "masks.safetensors", make_model(), loss_fn)
    for name in made.layers:
        assert made.moments(name).keys() == found.moments(name).keys()
        for side, moment in made.moments(name).items():
            assert torch.equal(found.moments(name)[side], moment)
    for calibrate in (lambda: found.calibrate(batches), found.merge_calibration):
        with pytest.raises(RuntimeError, match="has the masks of a file and draws none"):
            calibrate()


def test_a_file_of_masks_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"masks\.safetensors"):
        dropinf.Compressor.from_masks(tmp_path / "masks.safetensors", make_model(), loss_fn)


def test_arguments_of_another_kind_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        dropinf.Compressor.from_index(tmp_path, None, loss_fn)
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        dropinf.Compressor.from_index(tmp_path, make_model(), None)


def test_queries_of_a_loss_that_mixes_samples(tmp_path, batches):
    def centred(model, batch):
        out = model(batch[0])
        return (out - out.mean(0)).square().sum(1)

    made = dropinf.Compressor(make_model(), dropinf.Dropout(3), centred, mixing=True)
    index = made.compress(batches, out=tmp_path / "idx")
    with pytest.raises(dropinf.AttributionError, match="mixing=True"):
        dropinf.Compressor.from_index(index, make_model(), centred).compress(batches)
    found = dropinf.Compressor.from_index(index, make_model(), centred, mixing=True, audit="every")
    torch.testing.assert_close(found.compress(batches).flat, index[:].flat)
    assert len(found.audits) == 1 + len(batches)  # and the first batch of the index
    with pytest.raises(ValueError, match="audit must be one of"):
        dropinf.Compressor.from_index(index, make_model(), centred, audit="often")
