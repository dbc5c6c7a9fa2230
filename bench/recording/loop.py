"""Training as the tasks of bench.fidelity do it, with samples that may be left out of steps, recorded if asked."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf
from bench.fidelity.tasks import Task, classification


@dataclass
class Recorded:
    """What is recorded of a run: on which masks, where, with what beside the rows."""

    sketch: Any
    out: Path
    losses: bool = False
    drawn_every: int = 0


@dataclass
class Training:
    """One training of a task by a seed: its batches, and its states before each step."""

    task: Task
    seed: int

    def __post_init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.model = self.task.build()
            n = len(self.task.train[0])
            self.order = [p for _ in range(self.task.epochs) for p in torch.randperm(n).split(self.task.batch)]
        self.states: dict[int, dict[str, Any]] = {}

    def at(self, step: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return model, optimizer and schedule before a step, of which an earlier run kept the state."""
        model = copy.deepcopy(self.model).train()
        optimizer = torch.optim.AdamW(model.parameters(), self.task.rate, weight_decay=self.task.decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.task.rate, total_steps=len(self.order))
        if step:
            for part, held in zip((model, optimizer, schedule), copy.deepcopy(self.states[step]), strict=True):
                part.load_state_dict(held)
        return model, optimizer, schedule

    def run(
        self,
        without: Callable[[int], Tensor | None] = lambda _: None,
        *,
        begin: int = 0,
        keep: bool = False,
        recorded: Recorded | None = None,
    ) -> tuple[nn.Module, torch.optim.Optimizer, dropinf.Recording | None]:
        """Train. ``without(step)``: places in the step's batch of samples that are left out of it, or None.

        ``begin``: the step to begin at, from a state that an earlier run kept.
        """
        task = self.task
        model, optimizer, schedule = self.at(begin)
        recording = contextlib.nullcontext()
        if recorded is not None:
            recording = dropinf.record(model, recorded.sketch, optimizer, out=recorded.out)
        with recording as run:
            for step in range(begin, len(self.order)):
                if keep:
                    self.states[step] = copy.deepcopy([x.state_dict() for x in (model, optimizer, schedule)])
                rows = self.order[step]
                batch = tuple(x[rows] for x in task.train)
                if run is not None:
                    run.samples(rows.tolist(), labels=labels_of(task))
                logits, labels = outputs(task, model, batch)
                losses = losses_of(logits, labels)
                if run is not None and recorded is not None:
                    beside(run, recorded, step, logits, losses)
                out = without(step)
                share = torch.full((len(rows),), 1 / len(rows))
                if out is not None:
                    share[out] = 0
                optimizer.zero_grad()
                (losses * share).sum().backward()
                optimizer.step()
                schedule.step()
        return model.eval(), optimizer, run


def outputs(task: Task, model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return logits [n, classes] or [n, classes, words] and labels."""
    if task.loss_fn is classification:
        return model(batch[0]), batch[1]
    return model(batch[0][:, :-1]).mT, batch[0][:, 1:]


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each sample [n], the mean over its words."""
    return F.cross_entropy(logits, labels, reduction="none").view(len(labels), -1).mean(1)


def beside(run: dropinf.Recording, recorded: Recorded, step: int, logits: Tensor, losses: Tensor) -> None:
    """Have a run note what is wanted beside the rows."""
    if recorded.losses:
        run.losses(losses)
    if recorded.drawn_every and step % recorded.drawn_every == 0:
        generator = torch.Generator().manual_seed(step)
        chances = logits.detach().movedim(1, -1).softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(chances.shape[:-1])
        run.drawn(losses_of(logits, drawn).mean())


def labels_of(task: Task) -> float:
    """Return how many labels a sample's loss is the mean of."""
    return 1.0 if task.loss_fn is classification else float(task.train[0].shape[1] - 1)
