"""A recorded run on disk: its masks, its steps, and what is needed to follow them backwards."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_whole
from ..gradients import GradientSource, RunKind, StepScores
from ..origin import Origin
from ..readonly import ReadOnly
from .adjoint import Past
from .optimizers import UPDATES, Columns, Kind, Update
from .steps import Step, StepFile
from .tracing import score_run

FORMAT = "dropinf-run-1"
ABOUT, MASKS, END = "run.json", "masks.safetensors", "end.json"
SEGMENT = 64  # steps between two that hold the optimizer's state


class Run:
    """A recorded training run: each sample's part of every step's gradient, on a mask.

    ``path``: the folder that `record` wrote. Raises FileNotFoundError where there is none, ValueError for another kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._about = _read(self.path / ABOUT)
        missing = {"ranks", "shapes", "digest", "kind", "groups", "sizes", "is_mask"} - self._about.keys()
        if missing:
            raise ValueError(f"{self.path / ABOUT}: it is damaged, {min(missing)} is missing; restore a copy")
        self._files = [StepFile(self.path / steps_name(rank)) for rank in range(self._about["ranks"])]

    def __repr__(self) -> str:
        return f"<Run {str(self.path)!r}: {len(self)} steps of {self._about['optimizer']}>"

    def __len__(self) -> int:
        """Return the number of steps."""
        return min(map(len, self._files))

    def __bool__(self) -> bool:
        """Return True: a run of no steps yet is one too."""
        return True

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Layer name -> the shape of one compressed gradient."""
        return ReadOnly({name: tuple(shape) for name, shape in self._about["shapes"].items()})

    @property
    def digest(self) -> Mapping[str, str]:
        """Layer name -> fingerprint of its sketch."""
        return ReadOnly(self._about["digest"])

    @property
    def kind(self) -> Kind | None:
        """The optimizer's update; None where it is not known, or the sketch is no mask: there are rows alone then."""
        found: Kind | None = self._about["kind"]
        return found

    @property
    def rows_alone(self) -> str:
        """Why there are rows alone; empty where there is the optimizer's trajectory too."""
        found: str = self._about["rows_alone"]
        return found

    @property
    def masks(self) -> Path:
        """The file of the run's masks, for the compressor of queries: `Compressor.from_masks(run.masks, ...)`."""
        return self.path / MASKS

    @property
    def origin(self) -> Origin | None:
        """The model that the run ended with; None while it goes on, or where it was cut short."""
        path = self.path / END
        return Origin(_read(path)["model"], "") if path.exists() else None

    @cached_property
    def columns(self) -> Columns:
        """How the columns of rows are split."""
        return Columns([math.prod(shape) for shape in self.shapes.values()], self._about["groups"])

    @cached_property
    def scale(self) -> Tensor:
        """How many weights each column stands for [K], float64."""
        sizes, widths = self._about["sizes"], self.columns.widths
        parts = [size / width if self._about["is_mask"] else 1.0 for size, width in zip(sizes, widths, strict=True)]
        return torch.as_tensor(self.columns.spread(parts), dtype=torch.float64).expand(sum(widths))

    def ids(self, step: int) -> list[str]:
        """Return the ids of a step's samples, in the order of its rows."""
        self._check_place(step)
        return [name for file in self._files for name in file.read(step).ids]

    def rows(self, step: int) -> Tensor:
        """Return each sample's part of a step's gradient [n, K], before clipping."""
        return self.step(step).rows

    def step(self, i: int) -> Step:
        """Return a step, the samples of all ranks one behind the other."""
        self._check_place(i)
        parts = [file.read(i) for file in self._files]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def drawn_at(self, steps: int) -> int:
        """Return which of the first ``steps`` is the last one with rows of labels drawn from the model; -1: none."""
        return self._files[0].read(steps - 1, ("gradient",)).drawn_at if steps else -1

    def drawn_steps(self) -> list[int]:
        """Return the steps that have rows of labels drawn from the model, in order."""
        found, at = [], self.drawn_at(len(self))
        while at >= 0:
            found.append(at)
            at = self.drawn_at(at)
        return found[::-1]

    def update(self, step: Step) -> Update:
        """Return what the optimizer does in a step. Raises ValueError of a run with rows alone."""
        if self.kind is None:
            raise ValueError(f"run: it has rows alone: {self.rows_alone}")
        return UPDATES[self.kind](self.columns, step.groups, step.counts)

    def _check_place(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise IndexError(f"step {i} is out of range for {len(self)} steps")

    def state(self, i: int) -> list[Tensor]:
        """Return the optimizer's state [K] on the mask before step ``i``, or at the end, float64.

        Raises IndexError where there is no such step, ValueError of a run with rows alone, or damaged.
        """
        if self.kind is None:
            raise ValueError(f"run: it has rows alone, and no state: {self.rows_alone}")
        if not 0 <= i <= len(self) or not len(self):
            raise IndexError(f"step {i} is out of range for {len(self)} steps")
        begin = i - i % SEGMENT if i < len(self) or i % SEGMENT else i - SEGMENT
        state = self._state_at(begin)
        for at in range(begin, i):
            state = self._advanced(self._files[0].read(at), state)
        return state

    def _state_at(self, i: int) -> list[Tensor]:
        return [x.double() for x in self._files[0].read(i, ("gradient",)).state]

    def _advanced(self, step: Step, state: list[Tensor]) -> list[Tensor]:
        weights = None if step.weights is None else step.weights.double()
        return self.update(step).advance(state, step.gradient.double(), weights)

    def backwards(self) -> Iterator[tuple[int, Step, Past]]:
        """Yield (number, step, what the pass backwards needs of it), the last first; one segment is in memory."""
        for begin in reversed(range(0, len(self), SEGMENT)):
            steps = range(begin, min(begin + SEGMENT, len(self)))
            state, states = self._state_at(begin), []
            for i in steps:
                state = self._advanced(self._files[0].read(i, ("gradient", "weights")), state)
                states.append(state)
            for i in reversed(steps):
                step = self.step(i)
                weights = None if step.weights is None else step.weights.double()
                after = states[i - begin]
                past = Past(
                    self.update(step),
                    step.gradient.double(),
                    after,
                    weights,
                    step.clipped,
                    step.rows.double(),
                    step.norm,
                )
                yield i, step, past

    def score(self, query: GradientSource, kind: RunKind = "adamw", **options: Any) -> StepScores:
        """Return the scores of each sample's part of each step; see `dropinf.recording.score_run` for the options."""
        self._check_length()
        return score_run(query, self, kind, **options)

    def _check_length(self) -> None:
        """Raise ValueError where steps of a run that was ended are missing."""
        path = self.path / END
        ended = _read(path).get("steps") if path.exists() else len(self)
        if ended != len(self) or any(len(file) != len(self) for file in self._files):
            raise ValueError(f"run: {self.path} holds {len(self)} steps, and ended with {ended}; restore a copy")

    def save_end(self, model: str, steps: int) -> None:
        """Note the model that the run ended with, by its fingerprints, and behind how many steps."""
        write_whole(self.path / END, json.dumps({"format": FORMAT, "model": model, "steps": steps}).encode())


def steps_name(rank: int) -> str:
    """Return the name of the file that holds one rank's steps."""
    return f"steps-{rank}.bin"


def _joined(parts: list[Step]) -> Step:
    """Return a step of several ranks: their gradient is one, their samples are not."""
    given: dict[str, Any] = {"ids": [name for part in parts for name in part.ids]}
    for name in ("rows", "share", "losses", "drawn", "drawn_share"):
        found = [getattr(part, name) for part in parts]
        given[name] = torch.cat(found) if all(x is not None for x in found) else None
    return replace(parts[0], **given)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"run: there is no recorded run in {path.parent} ({path.name} is missing)") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: it is not of a recorded run")
    return found
