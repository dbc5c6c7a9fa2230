"""Do rows of few bits find what whole gradients rank first? Recall of the exact top 20 of 10,000 samples.

*Exact* is `dropinf.rerank` of all samples: along the direction that the code's own float rows give (what a user looks
again with), and along that of uncompressed EK-FAC. Every method's recall is measured against the same two rankings.

python -m bench.fidelity.recall mlp-fashion        # or gpt-brown; all methods, where they are not in the table
python -m bench.fidelity.recall mlp-fashion --cost # CPU seconds of a second look at 1,000 samples, and of a whole pass
python -m bench.fidelity.recall --report           # the tables, of what is there
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dropinf
from bench.files import read_rows, write_rows
from dropinf_kernels import dequantize_bits, quantize_bits

from . import data
from .evaluate import CALIBRATION, METHODS, calibration, size
from .loo import interval
from .tasks import Task, task

PATH = Path("bench/results/fidelity/recall.csv")
COST_PATH = Path("bench/results/fidelity/recall_cost.csv")
N, TOP, AMONG = 10_000, 20, (100, 1000)
QUERIES = {"mlp-fashion": 50, "gpt-brown": 10}
EPOCHS = {"mlp-fashion": 5, "gpt-brown": 2}
WHOLE = {"mlp-fashion": N, "gpt-brown": 2000}  # samples that uncompressed EK-FAC is fitted to
FEW = ((64, 1), (128, 1), (256, 1), (512, 1), (256, 2), (512, 2))  # bytes a sample, bits a coordinate
FITTED = (N, 1000)  # rows that a code, or the Fisher matrix of float rows, is fitted to
UNROUNDED = ", before rounding"
VARIANTS: dict[str, dict[str, bool]] = {
    "": {}, ", whitened once": {"again": False}, ", not shrunk": {"shrink": False},
    ", whitened once, not shrunk": {"again": False, "shrink": False}, UNROUNDED: {},
}  # fmt: skip
ABLATIONS, ABLATED = (", not shrunk", ", whitened once, not shrunk", UNROUNDED), (256, 1)  # of one size alone
TARGETS = ("own", "ekfac")
RECALLS = [f"{target}_{among}{end}" for target in TARGETS for among in AMONG for end in ("", "_low", "_high")]
FIELDS = ("task", "method", "bytes", "fitted", *RECALLS, "queries", "samples")
COST_FIELDS = ("task", "what", "samples", "queries", "cpu_seconds")


def large(name: str) -> Task:
    """A task of bench.fidelity.tasks with ten times the samples, trained for fewer epochs."""
    found, count = task(name), QUERIES[name]
    if name == "gpt-brown":
        chunks = data.brown(context=32, vocabulary=2048)
        train: tuple[Tensor, ...] = (chunks[torch.arange(len(chunks)) % 11 != 5][:N],)
    else:
        x, y = data.fashion_mnist("train")
        train = x[:N], y[:N]
    query = tuple(x[:: len(x) // count][:count] for x in found.query)
    return replace(found, train=train, query=query, epochs=EPOCHS[name])


class Bench:
    """A trained model, its gradients by sketch, and the exact rankings."""

    def __init__(self, name: str) -> None:
        self.name, self.task = name, large(name)
        self.part = calibration(self.task, CALIBRATION)
        self.model = self.task.fit(torch.ones(N, dtype=torch.bool), 0)
        self._exact: dict[int, Tensor] = {}
        self._rows: dict[int, tuple[dropinf.Gradients, dropinf.Gradients, dropinf.Compressor]] = {}

    def compressed(self, sketch: dropinf.Sketch) -> tuple[dropinf.Gradients, dropinf.Gradients, dropinf.Compressor]:
        compressor = dropinf.Compressor(self.model, sketch, self.task.loss_fn)
        compressor.calibrate(self.part)
        train, query = (compressor.compress(self.task.batches(which, 250)) for which in ("train", "query"))
        return train, query, compressor

    def choice(self, **options: Any) -> dropinf.Choice:
        return dropinf.choose(self.model, self.part, self.task.loss_fn, **options)

    def rows(self, choice: dropinf.Choice) -> tuple[dropinf.Gradients, dropinf.Gradients, dropinf.Compressor]:
        """Return the float rows of a choice of few bits; those of the last size are kept."""
        room = choice.bytes_per_sample
        if room not in self._rows:
            self._rows = {room: self.compressed(choice.sketch)}
        return self._rows[room]

    def looked_again(self, direction: dropinf.Direction) -> Tensor:
        """Return the products of all samples' whole gradients with the queries' directions, [Q, N]."""
        return dropinf.rerank(self.model, self.task.batches("train", 500), direction, self.task.loss_fn)

    def exact(self, choice: dropinf.Choice) -> Tensor:
        """Return all samples' scores along the direction of a choice's float rows, fitted to all of them."""
        room = choice.bytes_per_sample
        if room not in self._exact:
            train, query, compressor = self.rows(choice)
            fisher = dropinf.build_fisher(train, "kronecker", "auto")
            self._exact[room] = self.looked_again(dropinf.direction(query, fisher, compressor))
        return self._exact[room]

    @cached_property
    def ekfac(self) -> Tensor:
        """All samples' scores under uncompressed EK-FAC, whose rows are made twice and never held together."""
        compressor = dropinf.Compressor(self.model, dropinf.Identity(), self.task.loss_fn)
        fisher, batches = dropinf.Fisher("kronecker", "auto"), self.task.batches("train")[: WHOLE[self.name] // 50]
        for step in (fisher.update, fisher.correct):
            for batch in batches:
                step(compressor.compress([batch]))
        query = compressor.compress(self.task.batches("query"))
        return self.looked_again(dropinf.direction(query, fisher, compressor))


def drawn(train: dropinf.Gradients, count: int) -> dropinf.Gradients:
    """Return rows drawn at random, in order; all of them where they are no more."""
    if count >= len(train):
        return train
    at = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:count]
    return train[at.sort().values]


def coded(code: dropinf.BitCode, train: dropinf.Gradients, query: dropinf.Gradients, *, rounded: bool) -> Tensor:
    """Return the scores of rows of few bits, [Q, N]; or of the floats that they are made of."""
    rows = code.rows(train).flat
    if rounded:
        rows = dequantize_bits(*quantize_bits(rows, code.bits), code.bits)
    return code.queries(query).flat.float() @ rows.T


def methods(bench: Bench) -> Iterator[tuple[dict[str, Any], Callable[[], tuple[Tensor, Tensor]]]]:
    """Yield what each row of the table is about, and what gives its scores and the exact ones."""
    for (room, bits), fitted, variant in product(FEW, FITTED, VARIANTS):

        def few(
            room: int = room, bits: Any = bits, fitted: int = fitted, variant: str = variant
        ) -> tuple[Tensor, Tensor]:
            choice = bench.choice(budget_bytes=room, bits=bits)
            train, query, _ = bench.rows(choice)
            code = choice.code(drawn(train, fitted), **VARIANTS[variant])
            return coded(code, train, query, rounded=variant != UNROUNDED), bench.exact(choice)

        if variant not in ABLATIONS or (room, bits) == ABLATED:
            yield {"method": f"{bits} bit{'s' * (bits > 1)}{variant}", "bytes": room, "fitted": fitted}, few
    for room in dict.fromkeys(room for room, _ in FEW):
        for method in ("choose, float32", "gaussian", "the code's float rows"):

            def floats(room: int = room, method: str = method) -> tuple[Tensor, Tensor]:
                few = bench.choice(budget_bytes=room, bits=1)
                exact = bench.exact(few)
                if method == "the code's float rows":
                    return exact, exact
                if method == "gaussian":
                    dim = size(bench.model, METHODS[method], room, bench.task.loss_fn)
                    sketch: dropinf.Sketch = METHODS[method].sketch(dim)
                else:
                    sketch = bench.choice(budget_bytes=room).sketch
                train, query, _ = bench.compressed(sketch)
                return dropinf.score(query, train, dropinf.build_fisher(train, "kronecker", "auto")), exact

            yield {"method": method, "bytes": room, "fitted": N}, floats


def recall(scores: Tensor, exact: Tensor, among: int) -> Tensor:
    """Return each query's share of the exact top that is among the best by scores, [Q]."""
    best = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, scores.topk(among).indices, True)
    return best.gather(1, exact.topk(TOP).indices).double().mean(1)


def run(name: str) -> None:
    rows, bench = read_rows(PATH), Bench(name)
    done = {(r["task"], r["method"], int(r["bytes"]), int(r["fitted"])) for r in rows}
    for about, both in methods(bench):
        if (name, *about.values()) in done:
            continue
        scores, own = both()
        row: dict[str, Any] = {"task": name, **about, "queries": len(scores), "samples": N}
        for target, exact in zip(TARGETS, (own, bench.ekfac), strict=True):
            for among in AMONG:
                found = recall(scores, exact, among)
                low, high = interval(found)
                values = {"": float(found.mean()), "_low": low, "_high": high}
                row |= {f"{target}_{among}{end}": f"{value:.3f}" for end, value in values.items()}
        rows.append(row)
        print(row, flush=True)
        write_rows(PATH, FIELDS, rows)


def cost(name: str) -> None:
    """Measure, in CPU seconds of one thread, so that what runs beside it counts little; the median of three."""
    bench = Bench(name)
    choice = bench.choice(budget_bytes=256, bits=1)
    train, query, compressor = bench.rows(choice)
    direction = dropinf.direction(query[:1], dropinf.build_fisher(train, "kronecker", "auto"), compressor)
    few = bench.task.batches("train", 250)[: AMONG[-1] // 250]
    code = choice.code(drawn(train, FITTED[-1]))
    jobs: dict[str, tuple[int, int, Callable[[], object]]] = {
        "rerank": (AMONG[-1], 1, lambda: dropinf.rerank(bench.model, few, direction, bench.task.loss_fn)),
        "extraction of float rows": (N, 0, lambda: compressor.compress(bench.task.batches("train", 250))),
        "code of float rows": (N, 0, lambda: code.rows(train)),
    }
    rows = [row for row in read_rows(COST_PATH) if row["task"] != name]
    for what, (samples, queries, job) in jobs.items():
        seconds = sorted(seconds_of(job) for _ in range(3))[1]
        about = {"task": name, "what": what, "samples": samples, "queries": queries}
        rows.append(about | {"cpu_seconds": f"{seconds:.3f}"})
        print(rows[-1], flush=True)
    write_rows(COST_PATH, COST_FIELDS, rows)


def seconds_of(job: Callable[[], object]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=tuple(QUERIES), nargs="?")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.task:
        (cost if arguments.cost else run)(arguments.task)
    if arguments.report:
        from .recall_report import report

        report()


if __name__ == "__main__":
    main()
