"""LDS of rows of few bits against their bytes, beside every other way to make rows of that size.

python -m bench.fidelity.bits gpt-brown            # one task; all sizes and methods, where they are not in the table
python -m bench.fidelity.bits gpt-brown --kept     # what codes keep of float rows of 16 KB, none cut
python -m bench.fidelity.bits --report             # the table and the picture, of what is there
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dropinf
from bench.files import read_rows, write_rows
from dropinf import metrics
from dropinf.fisher.rotation import Rotation
from dropinf_kernels import dequantize_bits, quantize_bits, quantize_rows

from .evaluate import METHODS, MODELS, calibration, size, tracked
from .retrain import losses_of
from .tasks import Task, task

PATH = Path("bench/results/fidelity/bits.csv")
KEPT = Path("bench/results/fidelity/bits_kept.csv")
WHOLE = 16384
SIZES = (64, 128, 256, 512, 1024, 4096)
TASKS = ("mlp-fashion", "resnet9-fashion", "gpt-brown", "words-brown")
KINDS = ("block", "joint", "kronecker")
FIELDS = ("task", "method", "bytes", "lds", "lds_low", "lds_high", "kind", "float_lds", "shared_bytes", "samples")
ABLATED = ((256, 1), (256, 2))  # bytes and bits of which each part is left out
CALIBRATED = 300
Pairs = list[tuple[dropinf.Gradients, dropinf.Gradients]]


class Bench:
    """A task with its trained models, and gradients by sketch."""

    def __init__(self, found: Task) -> None:
        self.task, self.part = found, calibration(found, CALIBRATED)
        everything = torch.ones(len(found.train[0]), dtype=torch.bool)
        self.models = [found.fit(everything, seed) for seed in range(MODELS)]
        self.subsets, by_seed = losses_of(found.name)
        self.losses = by_seed.mean(1)

    def compressed(self, sketch: Callable[[nn.Module], dropinf.Sketch], layers: Any = None) -> Pairs:
        """Return gradients of training samples and queries of each model."""
        pairs = []
        for model in self.models:
            compressor = dropinf.Compressor(model, sketch(model), self.task.loss_fn, layers=layers)
            compressor.calibrate(self.part)
            pairs.append(tuple(compressor.compress(self.task.batches(which)) for which in ("train", "query")))
        return pairs

    def choices(self, **options: Any) -> list[dropinf.Choice]:
        return [dropinf.choose(model, self.part, self.task.loss_fn, **options) for model in self.models]

    def chosen(self, choices: list[dropinf.Choice]) -> Pairs:
        """Return gradients by a choice for each model."""
        left = iter(choices)
        return self.compressed(lambda _: next(left).sketch)

    def lds(self, scores: list[Tensor]) -> metrics.Estimate:
        """Return the LDS of the models' mean scores with its interval, for which a thousand resamples are taken."""
        return metrics.lds(torch.stack(scores).mean(0), self.subsets, self.losses)

    def plain_lds(self, scores: list[Tensor]) -> float:
        """Return the same without an interval."""
        predicted, actual = metrics.datamodel(torch.stack(scores).mean(0), self.subsets, self.losses)
        return float(metrics.spearman(predicted, actual).mean())


def best_kind(bench: Bench, pairs: Pairs) -> tuple[metrics.Estimate, str]:
    """Return the LDS of the kind of Fisher matrix that is best for these rows, in hindsight, and its name."""
    found = {
        kind: [dropinf.score(query, train, dropinf.build_fisher(train, kind, "auto")) for train, query in pairs]
        for kind in KINDS
    }
    kind = max(found, key=lambda kind: bench.plain_lds(found[kind]))
    return bench.lds(found[kind]), kind


def codes_of(code: dropinf.BitCode, train: dropinf.Gradients, query: dropinf.Gradients) -> Tensor:
    rows = dequantize_bits(*quantize_bits(code.rows(train).flat, code.bits), code.bits)
    return code.queries(query).flat.float() @ rows.T


def fitted(choices: list[dropinf.Choice], pairs: Pairs, **options: Any) -> Iterator[dropinf.BitCode]:
    part = options.pop("part", None)
    for choice, (train, _) in zip(choices, pairs, strict=True):
        yield choice.code(train if part is None else train[part], **options)


def few_bits(bench: Bench, bits: int, size: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table for rows of few bits of one size: the whole recipe, and without each part."""
    choices = bench.choices(budget_bytes=size, bits=bits)
    pairs = bench.chosen(choices)
    floats, kind = best_kind(bench, pairs)
    variants: dict[str, dict[str, Any]] = {"": {}}
    if (size, bits) in ABLATED:
        half = torch.randperm(len(pairs[0][0]), generator=torch.Generator().manual_seed(0)).sort().values
        variants |= {
            ", whitened once": {"again": False},
            ", queries not shrunk": {"shrink": False},
            ", whitened once, not shrunk": {"again": False, "shrink": False},
            ", block": {"fisher": "block"},
            ", block, whitened once, not shrunk": {"fisher": "block", "again": False, "shrink": False},
            ", fitted to half": {"part": half[: len(half) // 2]},
        }
    for name, options in variants.items():
        codes = list(fitted(choices, pairs, **options))
        scores = [codes_of(code, *pair) for code, pair in zip(codes, pairs, strict=True)]
        yield {
            "method": f"{bits} bit{'s' * (bits > 1)}{name}",
            "lds": bench.plain_lds(scores) if name else bench.lds(scores), "kind": codes[0].fisher.kind,
            "float_lds": f"{floats.value:.4f} ({kind})", "shared_bytes": codes[0].shared_bytes,
        }  # fmt: skip
    if (size, bits) in ABLATED:
        yield {"method": f"{bits} bit{'s' * (bits > 1)}, not rotated", **unrotated(bench, choices, pairs)}
        yield {"method": f"{bits} bit{'s' * (bits > 1)}, joint, not cut", **joint(bench, bits, pairs)}


def unrotated(bench: Bench, choices: list[dropinf.Choice], pairs: Pairs) -> dict[str, Any]:
    scores = []
    for code, (train, query) in zip(fitted(choices, pairs), pairs, strict=True):
        rotation = Rotation(code.width, code.seed)
        back = rotation(torch.eye(code.width)).T  # rows times this are what they were before
        rows = code.rows(train).flat.float() @ back
        rows = dequantize_bits(*quantize_bits(rows, code.bits), code.bits)
        scores.append(code.queries(query).flat.float() @ back @ rows.T)
    return {"lds": bench.plain_lds(scores), "kind": "kronecker"}


def joint(bench: Bench, bits: int, pairs: Pairs) -> dict[str, Any]:
    """Return codes of rows that a joint Fisher matrix whitened, of all coordinates."""
    scores = []
    for train, query in pairs:
        fisher = dropinf.build_fisher(train, "joint", "auto")
        width = train.flat.shape[1] // 8 * 8
        rotation = Rotation(width, 0)
        rows, asked = (rotation(fisher.whiten(x).flat[:, :width].float()) for x in (train, query))
        scores.append(asked @ dequantize_bits(*quantize_bits(rows, bits), bits).T)
    return {"lds": bench.plain_lds(scores), "kind": "joint"}


def of_floats(bench: Bench, size: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table for other ways to make rows of one size."""
    try:
        found, kind = best_kind(bench, bench.chosen(bench.choices(budget_bytes=size)))
        yield {"method": "choose, float32", "lds": found, "kind": kind}
    except ValueError:
        yield {"method": "choose, float32", "lds": None}
    try:
        pairs = bench.chosen(bench.choices(budget_bytes=4 * size))
        found, kind = best_kind(bench, [(as_int8(train), query) for train, query in pairs])
        yield {"method": "choose, int8", "lds": found, "kind": kind}
    except ValueError:
        yield {"method": "choose, int8", "lds": None}
    for name in ("gaussian", "logra (gaussian, linears only)", "pca"):
        yield {"method": name, **of_method(bench, name, size)}
    yield {"method": "rank one (LoRIF)", **low_rank(bench, size)}


def as_int8(train: dropinf.Gradients) -> dropinf.Gradients:
    """Return rows rounded to int8, a scale for each layer (whose bytes are not counted here)."""
    parts = []
    for layer in train.layers.values():
        values, scale = quantize_rows(layer.flatten(1))
        parts.append(values.float() * scale[:, None])
    return dropinf.Gradients(torch.cat(parts, 1), train.shapes, train.digest, train.origin)


def fits(bench: Bench, name: str, size_bytes: int) -> tuple[int, Any]:
    """Return the dim of a method's rows of so many bytes, and its layers; 0 where not even one value a layer fits."""
    method = METHODS[name]
    layers = tracked(bench.models[0], method)
    if layers == []:  # the output layer is the only one
        return 0, layers
    dim = size(bench.models[0], method, size_bytes, bench.task.loss_fn)
    probe = dropinf.Compressor(bench.models[0], dropinf.Dropout(dim), bench.task.loss_fn, layers=layers)
    stored = 4 * sum(torch.Size(layer.stored_shape).numel() for layer in probe.layers.values())
    return (dim if stored <= size_bytes else 0), layers


def of_method(bench: Bench, name: str, size_bytes: int) -> dict[str, Any]:
    dim, layers = fits(bench, name, size_bytes)
    if not dim:
        return {"lds": None}
    found, kind = best_kind(bench, bench.compressed(lambda _: METHODS[name].sketch(dim), layers))
    return {"lds": found, "kind": kind}


def low_rank(bench: Bench, size_bytes: int) -> dict[str, Any]:
    """Return rows of a left and a right vector for each layer's PCA-compressed gradient, the best rank one."""
    dim = 1
    while 4 * _rank_one_numbers(bench, dim + 1) <= size_bytes:
        dim += 1
    if 4 * _rank_one_numbers(bench, dim) > size_bytes:
        return {"lds": None}
    pairs = bench.compressed(lambda _: dropinf.PCA(dim))
    found, kind = best_kind(bench, [(rank_one(train), query) for train, query in pairs])
    return {"lds": found, "kind": kind}


def _rank_one_numbers(bench: Bench, dim: int) -> int:
    probe = dropinf.Compressor(bench.models[0], dropinf.Dropout(dim), bench.task.loss_fn)
    return sum(sum(layer.stored_shape) for layer in probe.layers.values())


def rank_one(train: dropinf.Gradients) -> dropinf.Gradients:
    parts = []
    for layer in train.layers.values():
        if layer.ndim == 3:
            u, s, v = torch.linalg.svd(layer, full_matrices=False)
            layer = u[:, :, :1] * s[:, None, :1] @ v[:, :1]
        parts.append(layer.flatten(1))
    return dropinf.Gradients(torch.cat(parts, 1), train.shapes, train.digest, train.origin)


def kept(name: str) -> None:
    """What codes of all coordinates keep of the float rows that they are of: 16 KB a sample, a 32nd with one bit."""
    rows, bench = [r for r in read_rows(KEPT) if r["task"] != name], Bench(task(name))
    pairs = bench.chosen(bench.choices(budget_bytes=WHOLE))
    for kind in ("block", "kronecker"):
        fishers = [dropinf.build_fisher(train, kind, "auto") for train, _ in pairs]
        floats = [dropinf.score(q, train, fisher) for (train, q), fisher in zip(pairs, fishers, strict=True)]
        base = bench.plain_lds(floats)
        for bits, parts in itertools.product((1, 2, 4), ({"again": False, "shrink": False}, {"again": False}, {})):
            scores = [
                codes_of(dropinf.BitCode.fit(train, fisher, bits=bits, **parts), train, query)
                for (train, query), fisher in zip(pairs, fishers, strict=True)
            ]
            found = bench.plain_lds(scores)
            name_ = "whitened again, shrunk" if not parts else "shrunk" if len(parts) == 1 else "plain"
            row = {"task": name, "kind": kind, "bits": bits, "codes": name_, "float_lds": f"{base:.4f}"}
            rows.append({**row, "lds": f"{found:.4f}", "kept": f"{found / base:.4f}"})
            print(rows[-1], flush=True)
    write_rows(KEPT, ("task", "kind", "bits", "codes", "float_lds", "lds", "kept"), rows)


def run(name: str, sizes: list[int]) -> None:
    rows = read_rows(PATH)
    bench = Bench(task(name))
    for size_bytes in sizes:
        jobs: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            f"{bits} bit{'s' * (bits > 1)}": partial(few_bits, bench, bits, size_bytes) for bits in (1, 2, 4)
        }
        jobs["choose, float32"] = partial(of_floats, bench, size_bytes)
        for first, job in jobs.items():
            if any((r["task"], r["method"], r["bytes"]) == (name, first, str(size_bytes)) for r in rows):
                continue
            for row in job():
                found = row.pop("lds")
                values = {} if found is None else {"lds": f"{getattr(found, 'value', found):.4f}"}
                if isinstance(found, metrics.Estimate):
                    values |= {"lds_low": f"{found.low:.4f}", "lds_high": f"{found.high:.4f}"}
                rows.append({"task": name, "bytes": size_bytes, "samples": len(bench.task.train[0]), **values, **row})
                print(rows[-1], flush=True)
            write_rows(PATH, FIELDS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS, nargs="?")
    parser.add_argument("--bytes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.task and arguments.kept:
        kept(arguments.task)
    elif arguments.task:
        run(arguments.task, arguments.bytes)
    if arguments.report:
        from .bits_report import report

        report()


if __name__ == "__main__":
    main()
