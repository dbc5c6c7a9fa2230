"""Recall of the exact best among those that rows of few bits recall, and what the exact second look costs.

python -m bench.fidelity.recall    # an MLP on 10,000 samples of Fashion-MNIST, 50 queries
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import dropinf
from bench.files import processor, write_rows
from dropinf_kernels import dequantize_bits, quantize_bits

from . import data
from .evaluate import METHODS, size
from .tasks import Batch, Task, task

PATH = Path("bench/results/fidelity/recall.csv")
FIELDS = ("rows", "bytes", "exact_by", "best", "among", "recall", "samples", "queries")
SAMPLES, QUERIES, BEST, AMONG = 10_000, 50, 20, (100, 1000)
SIZES = ((64, 1), (128, 1), (256, 1), (512, 1), (256, 2), (512, 2))


def larger() -> Task:
    """The MLP's task with ten times the samples, and as many steps."""
    found = task("mlp-fashion")
    (x, y), (qx, qy) = data.fashion_mnist("train"), data.fashion_mnist("t10k")
    return replace(found, train=(x[:SAMPLES], y[:SAMPLES]), query=(qx[:QUERIES], qy[:QUERIES]), epochs=4)


def whole_fisher(compressor: dropinf.Compressor, batches: list[Batch]) -> dropinf.Fisher:
    """EK-FAC on whole gradients, which are never held together."""
    fisher = dropinf.Fisher("kronecker", "auto")
    for batch in batches:
        fisher.update(compressor.compress([batch]))
    for batch in batches:
        fisher.correct(compressor.compress([batch]))
    return fisher


def recall(found: Tensor, exact: Tensor, among: int) -> float:
    """The share of each query's exact best that its best `among` hold, [Q, N] both."""
    best, recalled = exact.topk(BEST, 1).indices, found.topk(among, 1).indices
    return float((best[:, :, None] == recalled[:, None]).any(2).double().mean())


class Recall:
    """The trained model, its batches, and the exact scores that rows are compared with."""

    def __init__(self) -> None:
        self.task = larger()
        self.model: nn.Module = self.task.fit(torch.ones(SAMPLES, dtype=torch.bool), 0)
        self.batches, self.asked = self.task.batches("train", 500), self.task.batches("query")
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))[:300]
        self.part = [tuple(x[order] for x in self.task.train)]
        whole = dropinf.Compressor(self.model, dropinf.Identity(), self.task.loss_fn)
        fisher = whole_fisher(whole, self.batches)
        self.ekfac = self.reranked(dropinf.direction(whole.compress(self.asked), fisher, whole))

    def reranked(self, direction: dropinf.Direction) -> Tensor:
        return dropinf.rerank(self.model, self.batches, direction, self.task.loss_fn)

    def compressed(self, sketch: dropinf.Sketch) -> tuple[dropinf.Compressor, dropinf.Gradients, dropinf.Gradients]:
        compressor = dropinf.Compressor(self.model, sketch, self.task.loss_fn)
        compressor.calibrate(self.part)
        return compressor, compressor.compress(self.batches), compressor.compress(self.asked)

    def few_bits(self, size_bytes: int, bits: int) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """Yield (rows, what is exact, found, exact)."""
        choice = dropinf.choose(self.model, self.part, self.task.loss_fn, budget_bytes=size_bytes, bits=bits)
        compressor, train, query = self.compressed(choice.sketch)
        thousand = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))[:1000]
        for fitted, rows in (("", train), (", fitted to 1,000", train[thousand.sort().values])):
            code = choice.code(rows)
            stored = dequantize_bits(*quantize_bits(code.rows(train).flat, bits), bits)
            found = code.queries(query).flat.float() @ stored.T
            name = f"{bits} bit{'s' * (bits > 1)}{fitted}"
            yield name, "EK-FAC on whole gradients", found, self.ekfac
            exact = self.reranked(dropinf.direction(query, code.fisher, compressor))
            yield name, "the code's Fisher matrix", found, exact

    def floats(self, size_bytes: int) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        dim = size(self.model, METHODS["gaussian"], size_bytes, self.task.loss_fn)
        chosen = dropinf.choose(self.model, self.part, self.task.loss_fn, budget_bytes=size_bytes).sketch
        for name, sketch in (("choose, float32", chosen), ("gaussian, float32", dropinf.Gaussian(dim))):
            _, train, query = self.compressed(sketch)
            for kind in ("kronecker", "joint"):
                found = dropinf.score(query, train, dropinf.build_fisher(train, kind, "auto"))
                yield f"{name}, {kind}", "EK-FAC on whole gradients", found, self.ekfac

    def cost(self) -> str:
        """What a second look at 1,000 samples takes, beside a pass over all."""
        compressor, _, query = self.compressed(dropinf.Dropout(8))
        direction = dropinf.direction(query[:1], None, compressor)
        seconds = []
        for job in (
            lambda: dropinf.rerank(self.model, self.batches[:2], direction, self.task.loss_fn),
            lambda: compressor.compress(self.batches),
        ):
            job()
            start = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - start)
        return f"rerank of 1,000 samples {seconds[0]:.3f} s, compressing {SAMPLES:,} {seconds[1]:.3f} s ({processor()})"


def main() -> None:
    torch.set_num_threads(1)
    bench, rows = Recall(), []
    for size_bytes, bits in SIZES:
        found = list(bench.few_bits(size_bytes, bits)) + (list(bench.floats(size_bytes)) if bits == 1 else [])
        for name, by, scores, exact in found:
            for among in AMONG:
                share = recall(scores, exact, among)
                about = {"rows": name, "bytes": size_bytes, "exact_by": by, "best": BEST, "among": among}
                rows.append({**about, "recall": f"{share:.4f}", "samples": SAMPLES, "queries": QUERIES})
                print(rows[-1], flush=True)
        write_rows(PATH, FIELDS, rows)
    print(bench.cost(), flush=True)


if __name__ == "__main__":
    main()
