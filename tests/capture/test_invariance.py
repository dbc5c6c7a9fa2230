"""The same masks and the same results however the data is batched, ordered, padded, packed or wrapped."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from tests.api.models import build, squared
from tests.api.oracle import assert_equal_gradients, oracle


def many(name, n=64):
    """A model of the zoo with n samples."""
    model, batch, loss_fn = build(name)
    torch.manual_seed(2)
    if isinstance(batch, dict):
        return model, torch.randint(1, 40, (n, 6)), lambda m, ids: loss_fn(m, {"input_ids": ids})
    return model, torch.randn(n, *batch.shape[1:], dtype=batch.dtype), loss_fn


@pytest.mark.parametrize("name", ["mlp", "cnn", "rows_mlp", "gpt2", "raw_parameters", "lstm"])
def test_batch_size_and_order(name):
    model, data, loss_fn = many(name)
    sketch = dropinf.Dropout(dim=3, seed=5)
    whole = dropinf.compress(model, [data], loss_fn, sketch)
    for size in (1, 7):
        parts = dropinf.compress(model, data.split(size), loss_fn, sketch)
        whole.check_same_sketch(parts)
        torch.testing.assert_close(parts.flat, whole.flat, rtol=1e-10, atol=1e-12)
    order = torch.randperm(len(data))
    moved = dropinf.compress(model, data[order].split(16), loss_fn, sketch)
    torch.testing.assert_close(moved.flat, whole.flat[order], rtol=1e-10, atol=1e-12)


def test_pca_does_not_depend_on_the_batch_size():
    model, data, loss_fn = many("cnn")
    first = dropinf.Compressor(model, dropinf.PCA(2), loss_fn)
    first.calibrate([data])
    second = dropinf.Compressor(model, dropinf.PCA(2), loss_fn)
    second.calibrate(data[:40].split(7))
    second.calibrate(data[40:].split(8))
    for name, layer in first.layers.items():
        for a, b in (
            (layer.out_axis, second.layers[name].out_axis),
            (layer.in_axis, second.layers[name].in_axis),
        ):
            if a is not None and a.matrix is not None:
                torch.testing.assert_close(a.matrix, b.matrix, rtol=1e-4, atol=1e-5)


def test_masks_depend_on_seed_name_and_shape_alone():
    """Literal masks: another process, machine or version must draw the same."""
    code = (
        "import dropinf; a = dropinf.Dropout(dim=4, seed=3).make(32, 4, dropinf.sketch.Place('layer', 'in')); "
        "b = dropinf.Dropout(dim=4, group=2, seed=3).make(32, 4, dropinf.sketch.Place('layer', 'in')); "
        "print(a.index.tolist(), b.index.tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[[3, 21, 25, 31]] [[6, 7, 14, 15]]"
    model = nn.Linear(32, 32)
    layers = [
        dropinf.Compressor(nn.Sequential(model), dropinf.Dropout(4, seed=s), squared).layers["0"] for s in (3, 3, 4)
    ]
    assert torch.equal(layers[0].in_axis.index, layers[1].in_axis.index)
    assert not torch.equal(layers[0].in_axis.index, layers[2].in_axis.index)
    assert not torch.equal(layers[0].in_axis.index, layers[0].out_axis.index)
    assert torch.equal(layers[0].in_axis.index, layers[0].in_axis.index.sort().values)


class PackedAttention(nn.Module):
    """A causal transformer block that takes padded rows with a mask, or one packed row with document boundaries."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 8, padding_idx=0), nn.Embedding(12, 8)
        self.norm, self.qkv, self.out, self.head = (
            nn.LayerNorm(8),
            nn.Linear(8, 24),
            nn.Linear(8, 8),
            nn.Linear(8, 20),
        )

    def forward(self, ids, positions, mask):
        h = self.tokens(ids) + self.positions(positions)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return self.head(h)


class HeadNorms(PackedAttention):
    """Two heads with norms of their own, on [..., T, heads, d] for queries and on [..., heads, T, d] for keys."""

    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = nn.LayerNorm(4), nn.LayerNorm(4)

    def forward(self, ids, positions, mask):
        h = self.tokens(ids) + self.positions(positions)
        q, k, v = (x.unflatten(-1, (2, 4)) for x in self.qkv(self.norm(h)).chunk(3, -1))
        q, k = self.query_norm(q).transpose(1, 2), self.key_norm(k.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask)
        return self.head(h + self.out(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("build_model", [PackedAttention, HeadNorms])
@pytest.mark.parametrize(
    "sketch", [dropinf.Identity(), dropinf.Dropout(3), dropinf.Dropout(9, mode="flat"), dropinf.Gaussian(3)]
)
def test_padded_and_packed_documents_agree(sketch, build_model):
    model = build_model().double().eval()
    lengths = [3, 1, 6, 4]
    documents = [torch.randint(1, 20, (n,)) for n in lengths]
    width, total = max(lengths), sum(lengths)

    padded = torch.stack([F.pad(d, (0, width - len(d))) for d in documents])
    causal = torch.ones(width, width).tril().bool()

    def padded_loss(model, batch):
        ids, real = batch
        logits = model(ids, torch.arange(width).expand(len(ids), -1), causal)
        return (F.cross_entropy(logits.mT, ids, reduction="none") * real).sum(1)

    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    packed_mask = (rows[:, None] == rows) & torch.ones(total, total).tril().bool()
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def packed_loss(model, ids):
        logits = model(ids, positions, packed_mask)
        losses = F.cross_entropy(logits.mT, ids, reduction="none")[0]
        return torch.zeros(len(lengths), dtype=losses.dtype).index_add(0, rows, losses)

    real = (padded > 0).double()
    expected = oracle(model, padded_loss, (padded, real), len(lengths))
    a = dropinf.Compressor(model, sketch, padded_loss)
    b = dropinf.Compressor(model, sketch, packed_loss, cu_seqlens=lambda _: cu)
    assert_equal_gradients(a, a.compress([(padded, real)]), expected)
    assert_equal_gradients(b, b.compress([torch.cat(documents)[None]]), expected)


def test_compiled_model_with_inductor():
    model, batch, loss_fn = build("sequence_mlp")
    compiled = torch.compile(model)
    loss_fn(compiled, batch)
    compressor = dropinf.Compressor(compiled, dropinf.Dropout(3), lambda _, b: loss_fn(compiled, b))
    assert_equal_gradients(compressor, compressor.compress([batch]), oracle(model, loss_fn, batch, len(batch)))


def test_compiled_in_place():
    model, batch, loss_fn = build("sequence_mlp")
    expected = oracle(model, loss_fn, batch, len(batch))
    model.compile(backend="aot_eager")
    loss_fn(model, batch)
    compressor = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    assert_equal_gradients(compressor, compressor.compress([batch]), expected)


def test_layers_picks_by_pattern_and_type():
    model, batch, loss_fn = build("cnn")
    by_type = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn, layers=nn.Conv2d)
    assert {n.removesuffix(".bias") for n in by_type.layers} == {"0", "3", "6", "8"}
    assert by_type.skipped["11"] == "not picked by layers="
    by_name = dropinf.Compressor(model, dropinf.Identity(), loss_fn, layers=["11", "8.weight"])
    assert set(by_name.layers) == {"11", "11.bias", "8"}
    expected = oracle(model, loss_fn, batch, len(batch))
    kept = {layer.parameter: expected[layer.parameter] for layer in by_name.layers.values()}
    assert_equal_gradients(by_name, by_name.compress([batch]), kept)


def test_saved_masks_are_the_same_masks(tmp_path):
    model, batch, loss_fn = build("cnn")
    first = dropinf.Compressor(model, dropinf.PCA(3), loss_fn)
    first.calibrate([batch])
    first.save(tmp_path / "masks.safetensors")
    second = dropinf.Compressor(model, dropinf.PCA(3), loss_fn)
    second.load(tmp_path / "masks.safetensors")
    assert second.digest() == first.digest()
    assert torch.equal(second.compress([batch]).flat, first.compress([batch]).flat)
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]


def test_a_saved_calibration_goes_on(tmp_path):
    """Saved after the first half of the samples and resumed with the second: as if all came in one pass."""
    model, batch, loss_fn = build("sequence_mlp")
    halves = [batch, batch.flip(0) * 2]
    sketch = dropinf.Dropout(2, rank=4, whiten=True)
    whole, first, second = (dropinf.Compressor(model, sketch, loss_fn) for _ in range(3))
    whole.calibrate(halves)
    first.calibrate(halves[:1])
    first.save(tmp_path / "masks.safetensors")
    second.load(tmp_path / "masks.safetensors")
    second.calibrate(halves[1:])
    assert first.digest() != second.digest() == whole.digest()


def test_a_new_sketch_is_one_class():
    class Leading(dropinf.Sketch):
        """Keeps the first coordinates."""

        def axis(self, size, dim, key, statistics):
            return dropinf.Axis(size, torch.arange(dim, dtype=torch.int32)[None])

    model, batch, loss_fn = build("cnn")
    compressor = dropinf.Compressor(model, Leading(2), loss_fn)
    assert_equal_gradients(compressor, compressor.compress([batch]), oracle(model, loss_fn, batch, len(batch)))
    assert compressor.layers["0"].in_axis.index.tolist() == [[0, 1]]
