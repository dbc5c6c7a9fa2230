"""Tasks whose training is smooth enough for one sample's effect to be foreseen: GELU, no interpolation.

With ReLU, Adam takes each crossed kink as far as it goes: leaving a sample out by a tenth and whole then agree in rank
by .3, where they do by .98 and more here, so that no score could tell either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench.fidelity import data, tasks
from bench.fidelity.tasks import Task, classification


def _mlp(inputs: int, width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, 10)).double()


def _digits() -> Task:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x)[order] / 16, torch.tensor(y)[order]
    return Task(
        "mlp-digits",
        (x[:1000], y[:1000]),
        (x[1000:1060], y[1000:1060]),
        _mlp(64, 32),
        classification,
        8,
        40,
        1e-2,
        0.05,
    )


def _fashion() -> Task:
    def part(of: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
        return of[0][:n].double(), of[1][:n]

    train, query = part(data.fashion_mnist("train"), 2000), part(data.fashion_mnist("t10k"), 60)
    return Task("mlp-fashion-smooth", train, query, _mlp(784, 64), classification, 5, 50, 2e-3, 0.01)


def _gpt() -> Task:
    """The small GPT of bench.fidelity, 365,000 weights, for three epochs."""
    found = tasks.task("gpt-brown")
    return Task("gpt-brown-smooth", found.train, (found.query[0][:60],), found.build, found.loss_fn, 3, 20, 2e-3, 0.01)


_TASKS: dict[str, Callable[[], Task]] = {
    "mlp-digits": _digits,
    "mlp-fashion-smooth": _fashion,
    "gpt-brown-smooth": _gpt,
}
NAMES = tuple(_TASKS)


@functools.cache
def task(name: str) -> Task:
    return _TASKS[name]()
