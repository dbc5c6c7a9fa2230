"""Training from scratch on the best 10, 20, 30 %: a small GPT for one genre of Brown, ResNet-9 on wrong labels.

Every model is trained for the same number of epochs, so that one on a tenth of the samples takes a tenth of the steps.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

import dropinf
from bench.fidelity import data
from bench.fidelity.baselines import similarity
from bench.fidelity.tasks import GPT, Task, next_word

from . import removal, rows
from .methods import NAMES, Scored, Setup, each, scored
from .training import fit

EXPERIMENT = "selection"
SEEDS, POOL, VALIDATION, TEST = 3, 4000, 100, 300
PARTS = (10, 20, 30)  # percent of the samples
CONTEXT, VOCABULARY = 32, 2048
TARGETS = {"romance": "p"}  # the letter of a genre of Brown
SETUP = Setup(budget=16384)
EVERYTHING, SIMILARITY = "everything", "similarity"
NOISE = 20


@cache
def chunks() -> tuple[Tensor, Tensor]:
    """Return Brown's chunks of word ids, and the genre of each."""
    return data.brown_genres(CONTEXT, VOCABULARY)


def task(target: str, seed: int) -> tuple[Task, Tensor]:
    """Return a pool of chunks of all genres with validation chunks of one genre, and that genre's test chunks.

    A third of the genre, text by text, is for validation and a third for the test; the pool has neither.
    """
    ids, genres = chunks()
    letters = "abcdefghjklmnpr"
    generator = torch.Generator().manual_seed(seed)
    own = (genres == letters.index(TARGETS[target])).nonzero().flatten()
    third = len(own) // 3
    valid, test = (own[i * third : (i + 1) * third] for i in range(2))
    valid, test = (part[torch.randperm(third, generator=generator)] for part in (valid, test))
    free = torch.ones(len(ids), dtype=torch.bool)
    free[own[: 2 * third]] = False
    pool = free.nonzero().flatten()
    pool = pool[torch.randperm(len(pool), generator=generator)[:POOL]]
    made = Task(
        EXPERIMENT, (ids[pool],), (ids[valid[:VALIDATION]],), lambda: GPT(VOCABULARY, CONTEXT, 64, 2, 4), next_word,
        4, 16, 5e-3, 0.01,
    )  # fmt: skip
    return made, ids[test[:TEST]]


def perplexity(made: Task, seed: int, test: Tensor, kept: Tensor | None = None) -> float:
    """Train on some of the pool, and return the perplexity of test chunks."""
    model = fit(made, seed, kept).model
    with torch.no_grad():
        return math.exp(float(torch.cat([next_word(model, (part,)) for part in test.split(50)]).mean()))


def chosen(found: Scored, part: int) -> Tensor:
    """Return the positions of the best part of the samples, by the mean over queries."""
    names = dropinf.select(found.values.float(), keep=part / 100).ids
    return torch.tensor(sorted(map(int, names)))


def language(target: str, seed: int) -> None:
    """Write the rows of a genre that are missing."""
    setting = f"GPT, Brown {target}"
    done = rows.done(EXPERIMENT, setting, seed)
    made, test = task(target, seed)
    if EVERYTHING not in done:
        measures = {f"perplexity at {p} %": perplexity(made, seed, test) for p in (100,)}
        rows.add(EXPERIMENT, setting, seed, EVERYTHING, measures, 0.0)
    by_model = scored(made, seed, SETUP, f"{EXPERIMENT}/{target}")

    def score(name: str) -> Scored:
        return Scored(similarity(made), 0.0) if name == SIMILARITY else by_model(name)

    for method, found in each(score, tuple(n for n in (*NAMES, SIMILARITY) if n not in done)):
        if found is None:
            rows.add(EXPERIMENT, setting, seed, method, {"refused": math.nan}, math.nan)
            continue
        measures = {f"perplexity at {p} %": perplexity(made, seed, test, chosen(found, p)) for p in PARTS}
        rows.add(EXPERIMENT, setting, seed, method, measures, found.seconds)


def images(seed: int) -> None:
    """Write the rows of images with wrong labels that are missing, of the scores of `removal`."""
    setting = f"ResNet-9, {NOISE} % wrong labels"
    done = rows.done(EXPERIMENT, setting, seed)
    made, _, score = removal.scores(NOISE, seed)
    if EVERYTHING not in done:
        rows.add(EXPERIMENT, setting, seed, EVERYTHING, {"test accuracy at 100 %": removal.accuracy(made, seed)}, 0.0)
    for method, found in each(score, tuple(n for n in NAMES if n not in done)):
        if found is not None:
            measures = {f"test accuracy at {p} %": removal.accuracy(made, seed, chosen(found, p)) for p in PARTS}
            rows.add(EXPERIMENT, setting, seed, method, measures, found.seconds)


def run(seed: int) -> None:
    """Write the rows of a seed that are missing."""
    images(seed)
    for target in TARGETS:
        language(target, seed)
