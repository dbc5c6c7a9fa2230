"""One training loop: of all samples or some, with checkpoints, recorded where asked."""

from __future__ import annotations

import contextlib
import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dropinf
from bench.fidelity.tasks import Task
from bench.recording.loop import Recorded, beside, labels_of, losses_of, outputs


@dataclass
class Trained:
    """A model, and what is kept of its training."""

    task: Task
    seed: int
    model: nn.Module
    seconds: float  # of this process on a CPU
    run: dropinf.Recording | None = None
    states: list[dict[str, Any]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # the learning rate at each of the states


def fit(
    task: Task, seed: int, rows: Tensor | None = None, *, recorded: Recorded | None = None, checkpoints: int = 0
) -> Trained:
    """Train a task's model from scratch on some of its samples, for the task's number of epochs.

    ``rows``: their positions; None: all. ``checkpoints``: how many states to keep, each from the middle of an equal
    part of the steps, since the learning rate is nearly zero at the last one.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.build().train()
        rows = torch.arange(len(task.train[0])) if rows is None else rows
        order = [part for _ in range(task.epochs) for part in rows[torch.randperm(len(rows))].split(task.batch)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, task.rate, weight_decay=task.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=len(order))
    marks = {int((i + 0.5) * len(order) / checkpoints) for i in range(checkpoints)}
    found = Trained(task, seed, model, 0.0)
    recording: contextlib.AbstractContextManager[dropinf.Recording | None] = contextlib.nullcontext()
    if recorded is not None:
        recording = dropinf.record(model, recorded.sketch, optimizer, out=recorded.out)
    began = time.process_time()
    with recording as found.run:
        for step, part in enumerate(order):
            if step in marks:
                found.states.append(copy.deepcopy(model.state_dict()))
                found.rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            _losses(found, part, step, recorded).mean().backward()
            optimizer.step()
            schedule.step()
    found.seconds = time.process_time() - began
    model.eval()
    return found


def _losses(found: Trained, part: Tensor, step: int, recorded: Recorded | None) -> Tensor:
    """Return the loss of each sample of a step, and have the run note whose they are."""
    task = found.task
    if found.run is not None:
        found.run.samples(part.tolist(), labels=labels_of(task))
    logits, labels = outputs(task, found.model, tuple(x[part] for x in task.train))
    losses = losses_of(logits, labels)
    if found.run is not None and recorded is not None:
        beside(found.run, recorded, step, logits, losses)
    return losses
