"""Bytes and seconds of an index against model, dtype, samples and ranks, from rates measured here.

python -m bench.sizing    # half a minute; writes bench/results/sizing.json and the tables of bench/sizing/README.md
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import dropinf
from bench.files import replacing
from dropinf.files import file_checksum
from dropinf.index.codec import Codec

RESULTS = Path("bench/results/sizing.json")
README = Path("bench/sizing/README.md")
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
DTYPES = ("float32", "bfloat16", "int8")
BITS = (1, 2)
SIDE, BATCH, QUERIES = 64, 4096, 16
FEW_BYTES = (128, 256, 512, 1024, 4096)
# layers, width, feed-forward width, linears a layer, parameters
MODELS = {
    "SmolLM2-135M": (30, 576, 1536, 7, 135e6),
    "1B": (16, 2048, 8192, 7, 1.2e9),
    "8B": (32, 4096, 14336, 7, 8.0e9),
    "70B": (80, 8192, 28672, 7, 70e9),
}
TOKENS = 512
SAMPLES = (10**6, 10**8, 10**9)


class Batches(Sequence):
    """Inputs and output gradients, made as they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, b: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(b)
        return [torch.randn(BATCH, SIDE, generator=generator) for _ in range(2)]


def median(job: Callable[[], object], rounds: int = 5) -> float:
    """Seconds."""
    job()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


def measure() -> dict[str, float]:
    """Rates of this machine with all its threads, files in the page cache: bytes, rows or operations a second."""
    torch.manual_seed(0)
    compressor = dropinf.Compressor(
        nn.Linear(SIDE, SIDE, bias=False), dropinf.Identity(), lambda m, b: (m(b[0]) * b[1]).sum(1)
    )
    query = compressor.compress([Batches(1)[0]])[:QUERIES]
    found: dict[str, float] = {"threads": torch.get_num_threads(), "columns": SIDE * SIDE, "queries": QUERIES}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            batches, out = Batches(6), Path(folder) / dtype
            start = time.perf_counter()
            index = compressor.compress(batches, out=out, dtype=getattr(torch, dtype))
            size = index.info()["bytes"]
            found[f"write {dtype}, bytes/s"] = size / (time.perf_counter() - start)
            score = lambda index=index: dropinf.score(query, index, kind="dot", top=10)  # noqa: E731
            found[f"score {dtype}, values/s"] = len(index) * SIDE * SIDE / median(score)
            files = [file.path for file in index._files]
            found["checksum, bytes/s"] = size / median(lambda files=files: [file_checksum(f) for f in files])
        rows = index[: 2 * BATCH]
        found["Fisher, operations/s"] = len(rows) * (SIDE * SIDE) ** 2 / median(lambda: dropinf.build_fisher(rows), 3)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16)))
    x, k = torch.randn(16, 128, 1024), 32
    compressor = dropinf.Compressor(model, dropinf.Dropout(k), lambda m, b: m(b).square().sum((1, 2)))
    found["extraction, operations/s"] = 4 * 16 * 1024**2 * 16 * 128 / median(lambda: compressor.compress([x]), 5)
    return found


def scale(value: float, units: Sequence[tuple[float, str]]) -> str:
    size, unit = next(((s, u) for s, u in units if value >= s), units[-1])
    return f"{value / size:.3g} {unit}"


def bytes_text(value: float) -> str:
    return scale(value, [(1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")])


def time_text(seconds: float) -> str:
    return scale(seconds, [(86400 * 365, "years"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")])


def columns(model: str, dim: int) -> int:
    layers, _, _, linears, _ = MODELS[model]
    return layers * linears * dim * dim


def row_bytes(model: str, dim: int, dtype: str) -> int:
    layers, _, _, linears, _ = MODELS[model]
    count = layers * linears
    return Codec(dtype, tuple(map(str, range(count))), (dim * dim,) * count).row_bytes


def tables(found: dict[str, float]) -> str:
    """Markdown."""
    lines = ["Measured here, all threads, files in the page cache:", "", "| what | rate |", "|---|---:|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in found.items()]
    lines += ["", f"A sample of {TOKENS} tokens, every block's linears, `dim` on both axes:", ""]
    lines += ["| model | dim | columns | float32 | bfloat16 | int8 | of 10^6, int8 | of 10^9, int8 |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for model in MODELS:
        for dim in (16, 32, 64):
            sizes = [row_bytes(model, dim, dtype) for dtype in DTYPES]
            cells = [*map(bytes_text, sizes), bytes_text(1e6 * sizes[2]), bytes_text(1e9 * sizes[2])]
            lines.append(f"| {model} | {dim} | {columns(model, dim):,} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Rows of few bits of {max(SAMPLES):,} samples; beside the Fisher matrix of their float rows, all share:",
        "",
    ]
    lines += [
        "| bytes a sample | bits | coordinates | all samples | at most |",
        "|---:|---:|---:|---:|---:|",
    ]
    for size in FEW_BYTES:
        for bits in BITS:
            width = (size - 2) * 8 // bits
            cells = [bytes_text(max(SAMPLES) * size), bytes_text(2 * 4 * width**2)]
            lines.append(f"| {size:,} | {bits} | {width:,} | {' | '.join(cells)} |")
    lines += [
        "",
        "Predicted from the rates above, `dim` 16, on machines like this one (seconds = work / (rate x ranks)):",
        "",
    ]
    lines += ["| model | samples | ranks | extraction | writing | Fisher | 16 queries, float32 | int8 | manifest |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for model, (*_, parameters) in MODELS.items():
        for samples, ranks in zip(SAMPLES, (1, 64, 1024), strict=True):
            width = columns(model, 16)
            extraction = samples * 4 * parameters * TOKENS / found["extraction, operations/s"] / ranks
            writing = samples * row_bytes(model, 16, "int8") / found["write int8, bytes/s"] / ranks
            fisher = samples * width * 256 / found["Fisher, operations/s"] / ranks
            scores = [samples * width / found[f"score {dtype}, values/s"] / ranks for dtype in ("float32", "int8")]
            shards = max(64, samples * row_bytes(model, 16, "int8") / (1 << 26))
            cells = [*map(time_text, (extraction, writing, fisher, *scores)), bytes_text(shards * 81)]
            lines.append(f"| {model} | {samples:,} | {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    found = measure()
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    text = README.read_text()
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    with replacing(README) as temporary:
        temporary.write_text(f"{text[:start]}\n{tables(found)}\n{text[stop:]}")


if __name__ == "__main__":
    main()
