"""What extraction adds to the passes that any gradient needs: one batch of each model, one thread, CPU seconds.

`floor` is forward and backward to the activations, without a weight's gradient. Ratios of one run are what counts.

pytest bench/endtoend
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import dropinf

from .models import CASES, Case

SKETCHES = {
    "dropout": lambda k: dropinf.Dropout(k),
    "dropout, runs of 16": lambda k: dropinf.Dropout(k, group=16),
    "gaussian factors": lambda k: dropinf.Gaussian(k),
}


def bare(case: Case) -> None:
    with torch.no_grad():
        case.loss_fn(case.model, case.batch)


def floor(case: Case) -> None:
    """Frozen weights; the first activation asks for its gradient."""
    case.model.requires_grad_(False)
    embedding = next((m for m in case.model.modules() if isinstance(m, nn.Embedding)), None)
    batch = case.batch
    handle = None
    if embedding is not None:
        handle = embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    else:
        batch = (batch[0].clone().requires_grad_(True), batch[1])
    case.loss_fn(case.model, batch).sum().backward()
    if handle is not None:
        handle.remove()
    case.model.requires_grad_(True)


def training_step(case: Case) -> None:
    case.loss_fn(case.model, case.batch).mean().backward()
    case.model.zero_grad(set_to_none=True)


def extraction(case: Case, sketch: dropinf.Sketch) -> Callable[[], object]:
    """The weights of the linears and convolutions alone: what every contender can compress."""
    layers = [f"{name}.weight" for name in case.linears]
    compressor = dropinf.Compressor(case.model, sketch, case.loss_fn, layers=layers)
    return lambda: compressor.compress([case.batch])


@pytest.fixture(scope="module", params=CASES)
def case(request):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield CASES[request.param]()
    torch.set_num_threads(before)


def measure(benchmark, case: Case, job: Callable[[], object]) -> None:
    benchmark.group = f"{case.name}, {case.samples} samples"
    benchmark.pedantic(job, rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("job", [bare, floor, training_step], ids=lambda job: job.__name__)
def test_model_alone(benchmark, case, job):
    measure(benchmark, case, lambda: job(case))


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", SKETCHES)
def test_extraction(benchmark, case, name):
    measure(benchmark, case, extraction(case, SKETCHES[name](case.dim)))
