"""What scores of recorded runs foresee, against retraining: a sample left out of one step, left out of all, LDS.

python -m bench.recording.truth TASK [--seeds 2]

What retraining gave is kept in bench/results/recording, which saves whoever has it the time; rows go to
bench/results/recording.csv. Contenders: the recorded run's "adamw", with what is recorded beside the rows; its adjoint
without curvature; "tracin"; and those of bench.recording.contenders.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import dropinf
from bench.fidelity.tasks import Task
from bench.files import read_rows, save, write_rows
from dropinf import metrics

from .contenders import contenders
from .loop import Recorded, Training
from .tasks import NAMES, task

KEPT = Path("bench/results/recording")
TABLE = Path("bench/results/recording.csv")
FIELDS = ("task", "seed", "method", "numbers", "truth", "spearman", "low", "high", "seconds")
# Steps, and samples of each that are left out of one; samples left out of all; halves of the data that are trained on.
STEPS, EACH, SAMPLES, SUBSETS = 20, 3, 40, 40
BEGINNINGS = 3  # of the trainings on each half
WHOLE = "whole gradients"
Scores = tuple[Tensor, Tensor, Tensor]  # [Q, pairs] of steps, [Q, samples], [Q, N]


def pairs_of(training: Training) -> list[tuple[int, int]]:
    """The (step, place in its batch) that are left out; not of the first steps, which are steps of signs."""
    count = len(training.order)
    steps = np.linspace(5, count - 2, STEPS).astype(int).tolist()
    return [(step, place) for step in steps for place in range(EACH)]


def samples_of(found: Task) -> list[int]:
    """The samples that are left out of all steps."""
    return torch.randperm(len(found.train[0]), generator=torch.Generator().manual_seed(1))[:SAMPLES].tolist()


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """What an earlier call found, or what is made now."""
    if not path.exists():
        save(path, make().float().numpy())
    return torch.from_numpy(np.load(path)).double()


def left_out_of_steps(training: Training, base: Tensor) -> Tensor:
    """How much higher each query's loss is where a sample is left out of one step [Q, pairs]."""

    def one(step: int, place: int) -> Tensor:
        model, _, _ = training.run(lambda s: torch.tensor([place]) if s == step else None, begin=step)
        return training.task.losses(model) - base

    return torch.stack([one(*pair) for pair in tqdm(pairs_of(training), desc="steps")], 1)


def left_out(training: Training, base: Tensor) -> Tensor:
    """How much higher each query's loss is where a sample is left out of all steps [Q, samples]."""

    def one(sample: int) -> Tensor:
        model, _, _ = training.run(lambda s: (training.order[s] == sample).nonzero().flatten())
        return training.task.losses(model) - base

    return torch.stack([one(sample) for sample in tqdm(samples_of(training.task), desc="samples")], 1)


def on_halves(training: Training) -> Tensor:
    """Each query's loss under models that are trained on halves of the data, the mean over beginnings [M, Q]."""
    begun = [Training(training.task, training.seed + 100 * i) for i in range(BEGINNINGS)]

    def one(subset: Tensor) -> Tensor:
        models = [o.run(lambda s, o=o: (~subset[o.order[s]]).nonzero().flatten())[0] for o in begun]  # type: ignore[misc]
        return torch.stack([training.task.losses(model) for model in models]).mean(0)

    return torch.stack([one(subset) for subset in tqdm(halves(training.task), desc="halves")])


def halves(found: Task) -> Tensor:
    """The halves, bool [M, N]."""
    return metrics.sample_subsets(len(found.train[0]), SUBSETS, seed=0)


def of_run(training: Training, values: dropinf.StepScores) -> Scores:
    """Scores of steps, of the samples that are left out, and of all samples."""
    at = {(int(s), i): n for n, (s, i) in enumerate(zip(values.steps.tolist(), values.ids, strict=True))}
    places = [at[step, str(int(training.order[step][place]))] for step, place in pairs_of(training)]
    sums, ids = values.by_id()
    order = [ids.index(str(i)) for i in range(len(training.task.train[0]))]
    every = sums[:, order]
    return values.values[:, places], every[:, samples_of(training.task)], every


def of_samples(training: Training, every: Tensor, rates: list[float]) -> Scores:
    """The same of scores [Q, N] that know nothing of steps: a step's is its learning rate's part."""
    pairs = pairs_of(training)
    steps = torch.stack([every[:, training.order[s][p]] * rates[s] for s, p in pairs], 1)
    return steps, every[:, samples_of(training.task)], every


def recorded(training: Training, sketch: Any, losses: bool, drawn: int) -> Iterator[tuple[str, int, Scores, float]]:
    """Yield (method, numbers a sample, scores, seconds) of a recorded run."""
    found = training.task
    with tempfile.TemporaryDirectory() as folder:
        model, _, run = training.run(recorded=Recorded(sketch, Path(folder), losses, drawn))
        assert run is not None
        query = dropinf.Compressor.from_masks(run.masks, model, found.loss_fn).compress(found.batches("query"))
        beside = ", own losses" if losses else f", drawn every {drawn}" if drawn else ""
        settings: dict[str, dict[str, Any]] = {f"adamw{beside}": {}}
        if drawn:
            settings |= {f"adamw{beside}, gamma 2": {"gamma": 2.0}}
        if not losses and not drawn:
            settings |= {"adamw, window 5": {"window": 5}, "adamw without curvature": {"curvature": False}}
        for name, options in settings.items():
            began = time.perf_counter()
            scores = dropinf.score(query, run, kind="adamw", **options)
            yield name, sum(run.columns.widths), of_run(training, scores), time.perf_counter() - began
        if not losses and not drawn:
            yield "tracin", sum(run.columns.widths), of_run(training, dropinf.score(query, run, kind="tracin")), 0.0


def measured(training: Training, truths: tuple[Tensor, ...], scores: Scores) -> Iterator[tuple[str, metrics.Estimate]]:
    """Yield (truth, rank correlation with it)."""
    for what, found, truth in zip(("step", "sample"), scores[:2], truths[:2], strict=True):
        yield what, metrics.agreement(found.double(), truth.double())
    yield "lds", metrics.lds(scores[2], halves(training.task), truths[2])


def sketches(training: Training) -> dict[str, Any]:
    """The masks that are recorded on."""
    name = training.task.name
    k = {"mlp-digits": (16, 32), "mlp-fashion-smooth": (16, 32), "gpt-brown-smooth": (10, 10)}[name]
    flat = {"*bias*": 16, "*norm*": 16, "*": k[0] * k[1]}
    found: dict[str, Any] = {"factorized": dropinf.Dropout(k), "flat": dropinf.Dropout(flat, mode="flat")}
    if name == "gpt-brown-smooth":  # as many numbers as the last checkpoint's rows have
        return found | {"factorized, large": dropinf.Dropout(32)}
    # Coordinates of much energy, at the weights that training begins with.
    energy = dropinf.Compressor(training.model.eval(), dropinf.Dropout(k, sampling="energy"), training.task.loss_fn)
    energy.calibrate(training.task.batches("train")[:6])
    return found | {"factorized, energy": energy, WHOLE: dropinf.Identity()}


def recordings(training: Training) -> Iterator[tuple[str, int, Scores, float]]:
    """Yield what recorded runs on each mask foresee, with what is recorded beside the rows."""
    for mask, sketch in sketches(training).items():
        for losses, drawn in ((False, 0), (True, 0), (False, 4)):
            words = training.task.train[0].dtype == torch.int64  # of several labels a sample
            if (losses and words) or (mask == WHOLE and not losses):
                continue
            for method, numbers, scores, seconds in recorded(training, sketch, losses, drawn):
                yield f"{method}, {mask}", numbers, scores, seconds


def others(training: Training) -> Iterator[tuple[str, int, Scores, float]]:
    """Yield what all others foresee."""
    rates = [state[1]["param_groups"][0]["lr"] for _, state in sorted(training.states.items())]
    for method, numbers, every in contenders(training):
        yield method, numbers, of_samples(training, every, rates), 0.0


def rows_of(training: Training) -> Iterator[list[dict[str, str]]]:
    """Yield the rows of each contender."""
    model, _, _ = training.run(keep=True)
    base = training.task.losses(model)
    folder, name, seed = KEPT, training.task.name, training.seed
    truths = (
        kept(folder / f"{name}-steps-{seed}.npy", lambda: left_out_of_steps(training, base)),
        kept(folder / f"{name}-samples-{seed}.npy", lambda: left_out(training, base)),
        kept(folder / f"{name}-halves-{seed}.npy", lambda: on_halves(training)),
    )
    for method, numbers, scores, seconds in itertools.chain(recordings(training), others(training)):
        rows = []
        for what, found in measured(training, truths, scores):
            values = [f"{float(v):.4f}" for v in (found.value, found.low, found.high)]
            about = (name, str(seed), method, str(numbers), what, *values, f"{seconds:.2f}")
            rows.append(dict(zip(FIELDS, about, strict=True)))
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(arguments.seeds):
        rows = [r for r in read_rows(TABLE) if (r["task"], r["seed"]) != (arguments.task, str(seed))]
        for found in rows_of(Training(task(arguments.task), seed)):
            rows += found
            print(*found[0].values(), *(f"{r['truth']} {r['spearman']}" for r in found[1:]), flush=True)
            write_rows(TABLE, FIELDS, rows)


if __name__ == "__main__":
    main()
