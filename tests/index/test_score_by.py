"""Scores of an index taken apart: every dtype, one pass over its shards, sources by id."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf
from dropinf.index.codec import Codec
from dropinf.index.products import PartProducts, Products, Stored
from dropinf.index.reader import Index
from tests.index.small import make_batches, make_compressor, names

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def compressor() -> dropinf.Compressor:
    """Layers of 1,600 numbers, whose products are integers in int8, and narrow ones; gradients in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 4))
    return dropinf.Compressor(model, dropinf.Dropout(40), loss_fn)


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 48, generator=generator), torch.randint(4, (n,), generator=generator))
        for n in (3 + i % 4 for i in range(count))
    ]


def oracle(v: Tensor, rows: Tensor, shapes: dropinf.gradients.Shapes) -> dict[str, Tensor]:
    """The part of each layer, from its own columns of decoded rows, in float64."""
    start, found = 0, {}
    for name, shape in shapes.items():
        columns = slice(start, start := start + math.prod(shape))
        found[name] = v[:, columns].double() @ rows[:, columns].double().T
    return found


def near(found: Tensor, expected: Tensor, size: Tensor) -> None:
    """Equal to 8 roundings of a sum whose terms are as large as `size` together."""
    assert found.shape == expected.shape == size.shape
    assert float((found.double() - expected).abs().max() / size.max()) < 8 * torch.finfo(found.dtype).eps


@pytest.mark.parametrize("queries", [2, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype, queries):
    made, data, asked = compressor(), batches(9, 1), batches(3, 5)
    if dtype == torch.float64:
        made.model.double()
        data, asked = ([(x.double(), y) for x, y in some] for some in (data, asked))
    index = made.compress(data, out=tmp_path / "idx", dtype=dtype, fisher="kronecker")
    query, fisher = made.compress(asked)[:queries], index.fisher()
    rows, v = index[:].flat, fisher.solve(query).flat
    parts, sizes = oracle(v, rows, index.shapes), oracle(v.abs(), rows.abs(), index.shapes)
    total, size = sum(parts.values()), sum(sizes.values())
    layers = dropinf.score(query, index, fisher, by="layer")
    assert layers.names == tuple(index.shapes)
    for name, part in parts.items():
        near(layers[name], part, sizes[name])
    groups = dropinf.score(query, index, fisher, by={"ends": ("0*", "4*"), "biases": "2.bias", "rest": "*"})
    for group, members in {"ends": ["0", "0.bias", "4", "4.bias"], "biases": ["2.bias"], "rest": ["2"]}.items():
        near(groups[group], sum(parts[name] for name in members), sum(sizes[name] for name in members))
    whole = dropinf.score(query, index, fisher)
    for found in (layers, groups):
        near(found.values.sum(0), whole.double(), size)
    of = torch.arange(len(index)) % 3
    sums = dropinf.score(query, index, fisher, by="source", sources=of)
    near(sums.values, total @ F.one_hot(of).double(), size @ F.one_hot(of).double())


@pytest.mark.parametrize("kind", ["dot", "cosine"])  # rows as they are stored, and decoded
@pytest.mark.parametrize("by", ["layer", "source"])
def test_each_row_is_read_once(index, query, monkeypatch, by, kind):
    read, stored = [], Index._stored

    def noted(self, pieces, room):
        read.extend(pieces)
        return stored(self, pieces, room)

    monkeypatch.setattr(Index, "_stored", noted)
    dropinf.score(query, index, kind=kind, by=by, sources=[0] * len(index) if by == "source" else None)
    assert len(read) == len(set(read))
    assert sum(count for _, _, count in read) == len(index)


def test_sources_by_id(index, train, query):
    whole = dropinf.score(query, train, kind="dot")
    found = dropinf.score(query, index, kind="dot", by="source", sources=lambda name: name[1])
    firsts = [name[1] for name in index.ids()]
    assert found.names == tuple(dict.fromkeys(firsts))
    assert len(found) > 1
    for name, values in found.items():
        torch.testing.assert_close(values, whole[:, [first == name for first in firsts]].sum(1))


def test_sources_by_id_need_ids(tmp_path, query):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx")
    with pytest.raises(ValueError, match=r"sources is a function of ids, and train has none; .* made with ids="):
        dropinf.score(query, index, kind="dot", by="source", sources=str.upper)


def test_samples_in_another_order(tmp_path, query):
    """Rows that are stored in another order than the samples' still count for their own sample and source."""
    data = make_batches()
    count = sum(len(x) for x, _ in data)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    index = make_compressor().compress(data, out=tmp_path / "idx", ids=names, order=order)
    rows = index[:]
    assert not torch.equal(rows.flat, make_compressor().compress(data).flat)
    found = dropinf.score(query, index, kind="dot", by="layer")
    for name, part in oracle(query.flat, rows.flat, rows.shapes).items():
        near(found[name], part, part.abs())
    of = torch.arange(count) % 4
    sums = dropinf.score(query, index, kind="dot", by="source", sources=of)
    expected = query.flat @ rows.flat.T @ F.one_hot(of).double()
    near(sums.values, expected, expected.abs())


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("queries", [1, 9])
def test_products_of_parts(queries, by_row):
    """int8 rows with a scale for each layer, and with one a row as the first format version has them."""
    torch.manual_seed(0)
    widths, parts = (3, 300, 16, 2000, 255, 1100), [(0,), (1, 2, 5), (), (3, 4)]
    codec = Codec("int8", tuple("abcdef"), widths)
    kept = codec.encode(torch.randn(500, sum(widths)))
    scale = torch.rand(500) if by_row else codec.scales(kept["gradients"], kept["scale"])
    columns = torch.repeat_interleave(torch.arange(6), torch.tensor(widths))
    decoded = kept["gradients"].double() * (scale.double()[:, None] if by_row else scale.double()[:, columns])
    rows = Stored(kept["gradients"], scale)
    for q in (torch.randn(queries, sum(widths)), torch.randn(queries, sum(widths), dtype=torch.float64)):
        found = PartProducts(q, widths, parts).dot(rows)
        for out, part in zip(found, parts, strict=True):
            mine = torch.isin(columns, torch.tensor(part, dtype=torch.int64))
            wanted = q[:, mine].double() @ decoded[:, mine].T
            assert float((out - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max() if part else 1)
        whole = Products(q, widths).dot(rows)
        assert float((found.sum(0) - whole).abs().max() / whole.abs().max()) < 2e-6
