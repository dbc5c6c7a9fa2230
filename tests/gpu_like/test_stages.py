"""Every stage behind the rows on a GPU gives what it gives on a CPU: calibration, indices, Fisher matrices, scores."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn

import dropinf
from dropinf.index.codec import by_layers
from dropinf.index.products import Products, Stored
from dropinf.outflow import Outflow
from dropinf.score import ScoreKind
from tests.gpu_like.helpers import near, on_gpu, on_hooks, ways
from tests.gpu_like.pretend import move

N, T = 4, 3
LATER = pytest.mark.kernels


def model_of() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5))


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(N, T, 8, generator=generator) for _ in range(count)]


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().flatten(1).sum(1)


def on(place: str, data: list[Any], sketch: Any = None) -> tuple[dropinf.Compressor, list[Any]]:
    model = model_of() if place == "cpu" else move(model_of())
    compressor = dropinf.Compressor(model, sketch or dropinf.Dropout(dim=4), loss_fn)
    return compressor, data if place == "cpu" else on_gpu(data)


@pytest.mark.parametrize("sampling", ["energy", "uniform"])
@pytest.mark.parametrize("whiten", [True, pytest.param(False, marks=LATER)])
def test_calibration_draws_the_same(gpu, sampling, whiten):
    sketch = dropinf.Dropout(dim=4, sampling=sampling, whiten=whiten)
    (here, data), (there, moved) = on("cpu", batches(), sketch), on("gpu", batches(), sketch)
    for compressor, given in ((here, data), (there, moved)):
        compressor.calibrate(given[:1])
        compressor.calibrate(given[1:])
    for name, layer in here.layers.items():
        for axis, other in ((layer.out_axis, there.layers[name].out_axis), (layer.in_axis, there.layers[name].in_axis)):
            for field, table in ({} if axis is None else axis.tensors()).items():
                near(other.tensors()[field].float(), table.float(), 10)
    near(there.compress(moved).flat, here.compress(data).flat, 10)
    assert ways(there) == ways(here)


def test_rows_are_held_where_it_is_asked(gpu):
    (here, data), (there, moved) = on("cpu", batches()), on("gpu", batches())
    want = here.compress(data, device="cpu").flat
    for device in (None, "cpu", "cuda:0"):
        got = there.compress(moved, device=device).flat
        assert got.is_cuda == (device == "cuda:0")
        near(got, want)
    one_call = dropinf.compress(there.model, moved, loss_fn, dropinf.Dropout(dim=4), device="cuda:0").flat
    assert one_call.is_cuda
    near(one_call, want)


# How much more than float32's rounding a stored value may differ: by one step of its dtype.
STEPS = {None: 1, torch.bfloat16: 400, torch.float16: 100, torch.int8: 1000}


@pytest.mark.parametrize(
    "dtype", [None, torch.int8, *(pytest.param(d, marks=LATER) for d in (torch.bfloat16, torch.half))]
)
def test_indices(gpu, tmp_path, dtype):
    found = []
    for place in ("cpu", "gpu"):
        compressor, data = on(place, batches())
        first = compressor.compress(data, out=tmp_path / place, dtype=dtype, fisher="block")
        index = compressor.compress([data[0] + 1], out=tmp_path / place, dtype=dtype, append=True, fisher="block")
        assert len(index) == len(first) + N
        assert compressor.compress(data, out=tmp_path / place, dtype=dtype).info() == index.info()
        query = compressor.compress(data[:1], device=data[0].device)
        assert on_hooks(compressor)
        scores = dropinf.score(query, index, kind="dot"), dropinf.score(query, index, index.fisher())
        best = [
            dropinf.score(query, index, f, kind=k, top=5).values
            for f, k in ((index.fisher(), "influence"), (None, "dot"))
        ]
        parts = dropinf.score(query, index, index.fisher(), by="layer").values
        found.append((index[:].flat, *scores, *best, parts))
    for here, there in zip(*found, strict=True):
        near(there, here, 10 * STEPS[dtype])


@pytest.mark.parametrize("bits", [1, pytest.param(2, marks=LATER), pytest.param(4, marks=LATER)])
def test_indices_of_few_bits(gpu, tmp_path, bits):
    """Fitted on the CPU: codes are near a border of two here and there, so that a few may be the neighbour's."""
    (here, data), (there, moved) = on("cpu", batches()), on("gpu", batches())
    code = dropinf.BitCode.fit(here.compress(data), bits=bits)
    expected = here.compress(data, out=tmp_path / "cpu", dtype=code)
    index = there.compress(moved, out=tmp_path / "gpu", dtype=code)
    apart = (index[:].flat - expected[:].flat).norm() / expected[:].flat.norm()
    assert float(apart) < 0.2
    query, asked = here.compress(data[:1]), there.compress(moved[:1], device="cuda:0")
    turned = code.queries(asked)
    assert turned.flat.is_cuda
    near(turned.flat, code.queries(query).flat, 10)
    scores = dropinf.score(asked, expected)
    assert scores.is_cuda
    near(scores, dropinf.score(query, expected), 20)
    near(dropinf.score(asked, expected, top=5).values, dropinf.score(query, expected, top=5).values, 20)


def exact_mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(a.long() @ b.long())


BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.int8: 1}


@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_rows_are_converted_before_they_leave(gpu, tmp_path, dtype, monkeypatch):
    model, sent, put = move(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))), [], Outflow.put

    def noted(out, rows, take):
        sent.append(rows)
        put(out, rows, take)

    monkeypatch.setattr(Outflow, "put", noted)
    compressor = dropinf.Compressor(model, dropinf.Dropout(32), lambda m, x: m(x).square().sum(1))
    index = compressor.compress(on_gpu([torch.randn(4, 64)] * 2), out=tmp_path / "idx", dtype=dtype)
    assert len(sent) == 2  # one copy a batch
    least = 4 * index.manifest.codec.row_bytes
    for rows in sent:
        assert rows.is_cuda
        assert least <= rows.numel() * rows.element_size() <= 1.05 * least


def test_products_of_many_queries_with_integers(gpu, monkeypatch):
    # As on a processor whose products of integers are exact, which not every one has that runs this.
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", exact_mm)
    generator, widths = torch.Generator().manual_seed(3), (1024, 5, 1030)
    q = torch.randn(9, sum(widths), generator=generator)
    values = torch.randint(-127, 128, (40, sum(widths)), generator=generator, dtype=torch.int8)
    scale = torch.rand(40, len(widths), generator=generator).bfloat16()
    here = Products(q, widths).dot(Stored(values, scale))
    near(Products(on_gpu(q), widths).dot(Stored(values, scale)), here, 10)
    near(here, q @ by_layers(values.float(), scale.float(), widths).T, 10)


@pytest.mark.parametrize("kind", ["block", "kronecker", *(pytest.param(k, marks=LATER) for k in ("joint", "diagonal"))])
def test_fisher_matrices(gpu, kind):
    scores = []
    for place in ("cpu", "gpu"):
        compressor, data = on(place, batches())
        train, query = (compressor.compress(d, device=data[0].device) for d in (data, data[:1]))
        assert on_hooks(compressor)
        fisher = dropinf.build_fisher(train, kind)
        found = [dropinf.score(query, train, fisher, kind=k) for k in get_args(ScoreKind)]
        found += [dropinf.self_influence(train, fisher), dropinf.score(query, train, fisher, top=3).values]
        found.append(dropinf.score(query, train, fisher, by="layer").values)
        found.append(
            dropinf.score(query, train, fisher, by="source", sources=[i % 2 for i in range(len(train))]).values
        )
        assert all(x.is_cuda == (place == "gpu") for x in found)
        scores.append(found)
    for here, there in zip(*scores, strict=True):
        near(there, here, 100)


def packed_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    x, cu = batch
    per_token = model(x[None])[0].square().sum(-1)
    sample = torch.repeat_interleave(
        torch.arange(len(cu) - 1, device=x.device), cu.diff().to(x.device), output_size=len(x)
    )
    return torch.zeros(len(cu) - 1, device=x.device).index_add(0, sample, per_token)


@pytest.mark.parametrize("bounds_on", ["cpu", "gpu"])
def test_packed_documents(gpu, bounds_on):
    x, cu = torch.randn(10, 8), torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    rows = []
    for place in ("cpu", "gpu"):
        model = model_of() if place == "cpu" else move(model_of())
        batch = (x, cu) if place == "cpu" else (on_gpu(x), on_gpu(cu) if bounds_on == "gpu" else cu)
        compressor = dropinf.Compressor(model, dropinf.Dropout(dim=4), packed_loss, cu_seqlens=lambda batch: batch[1])
        rows.append(compressor.compress([batch]).flat)
        assert on_hooks(compressor)
    near(rows[1], rows[0])


def test_bounds_of_documents_are_checked_before_they_leave_the_cpu(gpu):
    batch = on_gpu(torch.randn(10, 8)), torch.tensor([0, 4, 3, 10])
    compressor = dropinf.Compressor(
        move(model_of()),
        dropinf.Dropout(dim=4),
        lambda model, batch: model(batch[0]).square().sum(-1)[:3],
        cu_seqlens=lambda batch: batch[1],
    )
    with pytest.warns(UserWarning, match="cu_seqlens decreases"):  # which is why no hook takes these layers
        compressor.compress([batch])
