"""What scores of recorded runs foresee, against retraining: a sample left out of one step, left out of all, LDS.

python -m bench.recording.truth TASK [--seeds 2]    # retraining is kept in out/recording; rows go to
results/recording.csv

Contenders: the recorded run's "adamw", with what is recorded beside the rows; its adjoint without curvature; "tracin";
and influence at the last checkpoint, its Fisher matrix with the damping that does best on the truth itself.
"""

from __future__ import annotations

import argparse
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

from .loop import Recorded, Training
from .tasks import NAMES, task

OUT = Path("out/recording")
TABLE = Path("bench/results/recording.csv")
FIELDS = ("task", "seed", "method", "numbers", "truth", "spearman", "low", "high", "seconds")
DAMPINGS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
# Steps, and samples of each that are left out of one; samples left out of all; halves of the data that are trained on.
STEPS, EACH, SAMPLES, SUBSETS = 20, 3, 40, 40
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
        save(path, make().numpy())
    return torch.from_numpy(np.load(path))


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
    """Each query's loss under models that are trained on halves of the data [M, Q]."""

    def one(subset: Tensor) -> Tensor:
        model, _, _ = training.run(lambda s: (~subset[training.order[s]]).nonzero().flatten())
        return training.task.losses(model)

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


def last_checkpoint(
    training: Training, sketch: dropinf.Sketch, rates: list[float]
) -> Iterator[tuple[str, int, Scores, float]]:
    """Yield the same of influence at the last checkpoint, for each kind of Fisher matrix and damping."""
    found = training.task
    model, _, _ = training.run()
    compressor = dropinf.Compressor(model, sketch, found.loss_fn)
    train, query = (compressor.compress(found.batches(which)) for which in ("train", "query"))
    numbers = train.flat.shape[1]
    yield "last checkpoint, dot", numbers, of_samples(training, dropinf.score(query, train, kind="dot"), rates), 0.0
    for kind in ("block", "kronecker"):
        fisher = dropinf.build_fisher(train, kind)
        for damping in DAMPINGS:
            scores = dropinf.score(query, train, fisher.with_damping(damping))
            yield f"last checkpoint, {kind} {damping:g}", numbers, of_samples(training, scores, rates), 0.0


def rates_of(training: Training) -> list[float]:
    """The learning rate of each step."""
    return [state[1]["param_groups"][0]["lr"] for _, state in sorted(training.states.items())]


def measured(training: Training, truths: tuple[Tensor, ...], scores: Scores) -> Iterator[tuple[str, metrics.Estimate]]:
    """Yield (truth, rank correlation with it)."""
    for what, found, truth in zip(("step", "sample"), scores[:2], truths[:2], strict=True):
        yield what, metrics.agreement(found.double(), truth.double())
    yield "lds", metrics.lds(scores[2], halves(training.task), truths[2])


def sketches(name: str) -> dict[str, dropinf.Sketch]:
    """The masks that are recorded on."""
    k = {"mlp-digits": (16, 32), "mlp-fashion-smooth": (16, 32), "gpt-brown-smooth": (10, 10)}[name]
    flat = {"*bias*": 16, "*norm*": 16, "*": k[0] * k[1]}
    found: dict[str, dropinf.Sketch] = {"factorized": dropinf.Dropout(k), "flat": dropinf.Dropout(flat, mode="flat")}
    if name == "gpt-brown-smooth":  # as many numbers as the last checkpoint's rows have
        found["factorized, large"] = dropinf.Dropout(32)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows(TABLE)
    for seed in range(arguments.seeds):
        training = Training(task(arguments.task), seed)
        model, _, _ = training.run(keep=True)
        base = training.task.losses(model)
        folder = OUT / arguments.task
        truths = (
            kept(folder / f"steps-{seed}.npy", lambda: left_out_of_steps(training, base)),  # noqa: B023
            kept(folder / f"samples-{seed}.npy", lambda: left_out(training, base)),  # noqa: B023
            kept(folder / f"halves-{seed}.npy", lambda: on_halves(training)),  # noqa: B023
        )
        contenders: list[tuple[str, Iterator[tuple[str, int, Scores, float]]]] = []
        for mask, sketch in sketches(arguments.task).items():
            for losses, drawn in ((False, 0), (True, 0), (False, 4)):
                if losses and training.task.train[0].dtype == torch.int64:
                    continue  # of several labels a sample
                contenders.append((mask, recorded(training, sketch, losses, drawn)))
        wide = dropinf.Dropout(32)
        contenders.append(("factorized", last_checkpoint(training, wide, rates_of(training))))
        for mask, every in contenders:
            for method, numbers, scores, seconds in every:
                name = f"{method}, {mask}"
                rows = [r for r in rows if (r["task"], r["seed"], r["method"]) != (arguments.task, str(seed), name)]
                line = []
                for what, found in measured(training, truths, scores):
                    values = [f"{float(v):.4f}" for v in (found.value, found.low, found.high)]
                    about = (arguments.task, str(seed), name, str(numbers), what, *values, f"{seconds:.2f}")
                    rows.append(dict(zip(FIELDS, about, strict=True)))
                    line.append(f"{what} {found.value:.3f}")
                print(f"{arguments.task} seed {seed}: {name}, {numbers} numbers: {', '.join(line)}", flush=True)
                write_rows(TABLE, FIELDS, rows)


if __name__ == "__main__":
    main()
