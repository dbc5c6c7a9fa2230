"""Scoring from an index on disk against NumPy's product of the same rows in memory; rows a second by dtype.

The files are in the page cache, every shard was compared with its checksum before (the first pass of a process does
that, at `test_checksums`' rate), and 16 queries are scored, keeping the best ten of each. One thread.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import nn

import dropinf
from dropinf.files import file_checksum
from dropinf.index.codec import Codec
from dropinf.index.products import Products, Stored
from dropinf_kernels.ops.topk import dot_rows

ROWS, BATCH, SIDE, QUERIES = 24_576, 4096, 64, 16  # a batch is a shard, of the 64 MiB that shards of long runs have
DTYPES = ("float32", "bfloat16", "float16", "int8")


def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) * batch[1]).sum(1)


def batches(rows: int, seed: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(BATCH, SIDE, generator=generator) for _ in range(2)] for _ in range(rows // BATCH)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def compressor() -> dropinf.Compressor:
    return dropinf.Compressor(nn.Linear(SIDE, SIDE, bias=False), dropinf.Identity(), loss_fn)


@pytest.fixture(scope="module")
def query(compressor):
    return compressor.compress(batches(BATCH, 1))[:QUERIES]


@pytest.fixture(scope="module", params=DTYPES)
def index(request, compressor, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return compressor.compress(batches(ROWS, 0), out=folder, dtype=getattr(torch, request.param))


def report(benchmark, rows: int) -> None:
    benchmark.group = f"{QUERIES} queries, {rows} rows of {SIDE * SIDE}"


def test_numpy_matmul(benchmark, compressor, query):
    rows, q = compressor.compress(batches(ROWS, 0)).flat.numpy(), query.flat.numpy()
    report(benchmark, ROWS)
    benchmark.pedantic(np.matmul, (q, rows.T), rounds=9, warmup_rounds=2)


def test_score_top(benchmark, index, query):
    report(benchmark, ROWS)
    benchmark.extra_info["dtype"] = index.manifest.dtype
    score = lambda: dropinf.score(query, index, kind="dot", top=10)  # noqa: E731
    found = benchmark.pedantic(score, rounds=9, warmup_rounds=2)
    assert found.values.shape == (QUERIES, 10)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda bits: f"{bits}bit")
def few(request, compressor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    code = dropinf.BitCode.fit(compressor.compress(batches(BATCH, 0)), "diagonal", bits=request.param, again=False)
    return compressor.compress(batches(ROWS, 0), out=folder / "few", dtype=code)


def test_score_top_of_few_bits(benchmark, few, query):
    """The queries are turned by the code each time: whitened, cut, rotated, shrunk."""
    report(benchmark, ROWS)
    benchmark.extra_info["dtype"] = few.manifest.dtype
    few.code  # noqa: B018  read once, as shards are compared once
    score = lambda: dropinf.score(query, few, top=10)  # noqa: E731
    found = benchmark.pedantic(score, rounds=9, warmup_rounds=2)
    assert found.values.shape == (QUERIES, 10)


def test_checksums(benchmark, index):
    report(benchmark, ROWS)
    files = [file.path for file in index._files]
    benchmark.pedantic(lambda: [file_checksum(path) for path in files], rounds=5, warmup_rounds=1)


LAYERS = {"500x16": (16,) * 500, "200x256": (256,) * 200, "1x4096": (4096,), "30x64,30x300": (64, 300) * 30}


@pytest.mark.parametrize("scales", ["by layer", "one a row"])
@pytest.mark.parametrize("queries", [1, QUERIES])
@pytest.mark.parametrize("widths", LAYERS.values(), ids=LAYERS)
def test_int8_layers(benchmark, widths, queries, scales):
    """1024 stored rows, their scales found and multiplied, against those of the format that had one scale a row."""
    generator = torch.Generator().manual_seed(0)
    codec = Codec("int8", tuple(map(str, range(len(widths)))), widths)
    kept = codec.encode(torch.randn(1024, codec.width, generator=generator))
    q = torch.randn(queries, codec.width, generator=generator)
    values, scale, products = kept["gradients"], kept.get("scale"), Products(q, widths)
    one = torch.rand(len(values), generator=generator)

    def by_layer() -> torch.Tensor:
        return products.dot(Stored(values, codec.scales(values, scale)))

    benchmark.group = f"{queries} queries, 1024 int8 rows of {len(widths)} layers, {codec.width} numbers"
    dot = by_layer if scales == "by layer" else lambda: dot_rows(q, values).mul_(one)
    found = benchmark.pedantic(dot, rounds=9, warmup_rounds=2)
    assert found.shape == (queries, 1024)
