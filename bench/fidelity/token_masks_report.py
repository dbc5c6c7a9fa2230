"""The tables of bench/results/fidelity/token_masks.csv, in bench/fidelity/README.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from bench.files import read_rows, write_between
from dropinf import metrics

from .loo import interval
from .token_masks import PATH, PREDICTED, QUERIES, SHARE, SHARES

README = Path("bench/fidelity/README.md")
Row = dict[str, str]


class Trainings:
    """The table's losses, by mask and seed."""

    def __init__(self, rows: list[Row]) -> None:
        self._losses = {
            (r["mask"], int(r["number"]), float(r["share"]), r["seed"]): torch.tensor(
                [float(r[str(q)]) for q in QUERIES], dtype=torch.float64
            )
            for r in rows
        }

    def masks(self, kind: str) -> list[tuple[int, float]]:
        """Numbers and shares of the masks of a kind that a model was trained with."""
        return list(dict.fromkeys((k[1], k[2]) for k in self._losses if k[0] == kind and k[3] != PREDICTED))

    def seeds(self, kind: str) -> list[str]:
        """Seeds of which all masks of a kind are there."""
        masks = self.masks(kind)
        found = dict.fromkeys(k[3] for k in self._losses if k[0] == kind and k[3] != PREDICTED)
        return [seed for seed in found if all((kind, *mask, seed) in self._losses for mask in masks)]

    def loss(self, kind: str, number: int, share: float, seeds: Iterable[str]) -> Tensor:
        """Return the mean over seeds of the queries' losses with a mask, [Q]; or what shares predict."""
        return torch.stack([self._losses[kind, number, share, seed] for seed in seeds]).mean(0)


def report() -> None:
    """Write both tables between their marks."""
    found = Trainings(read_rows(PATH))
    write_between(README, "token masks", f"{left_out(found)}\n\n{subsets(found)}")


def effects(found: Trainings, seeds: list[str]) -> dict[str, Tensor]:
    """Return by how much each query's loss rises, [Q], without its top tokens and with each control there is."""
    base = found.loss("none", 0, 0.0, seeds)
    random = torch.stack([found.loss("random", *mask, seeds) for mask in found.masks("random")]).mean(0)
    rises = {"random": random - base}
    for kind in ("top", "same words"):
        if set(seeds) <= set(found.seeds(kind)):
            own = [found.loss(kind, query, SHARE, seeds)[row] for row, query in enumerate(QUERIES)]
            rises[kind] = torch.stack(own) - base
    return rises


def left_out(found: Trainings) -> str:
    lines = [
        "| trainings | loss without top 1 % | without random 1 % | of the same words | queries where top is worst |",
        "|---|---|---|---|---:|",
    ]
    every, both = found.seeds("top"), found.seeds("same words")
    parts = {"seed 0, of the scored model": every[:1], "seeds 0 and 1": both}
    parts |= {f"all {len(every)} seeds": every, f"the other {len(every) - 1} seeds": every[1:]}
    for name, seeds in parts.items():
        rises = effects(found, seeds)
        cells = [_mean(rises[kind]) if kind in rises else "" for kind in ("top", "random", "same words")]
        controls = torch.stack([rises[kind] for kind in rises if kind != "top"]).amax(0)
        lines.append(f"| {name} | {' | '.join(cells)} | {int((rises['top'] > controls).sum())} of {len(controls)} |")
    return "\n".join(lines)


def _mean(per_query: Tensor) -> str:
    low, high = interval(per_query)
    return f"{float(per_query.mean()):.4f} [{low:.4f}, {high:.4f}]"


def subsets(found: Trainings) -> str:
    """Return rank correlations over random masks: of one size, where scores alone tell them apart, and of all."""
    lines = ["| random masks | masks | predicted and actual | size of the mask and actual |", "|---|---:|---|---|"]
    seeds, masks = found.seeds("subset"), found.masks("subset")
    for name, some in {**{f"{s:.0%} left out": (s,) for s in SHARES}, "all": SHARES}.items():
        chosen = [mask for mask in masks if mask[1] in some]
        actual = torch.stack([found.loss("subset", *mask, seeds) for mask in chosen]).T  # [Q, M]
        predicted = torch.stack([found.loss("subset", *mask, [PREDICTED]) for mask in chosen]).T
        count = torch.tensor([mask[1] for mask in chosen]).expand_as(actual)
        alone = _mean(metrics.spearman(count, actual)) if len(some) > 1 else ""
        lines.append(f"| {name} | {len(chosen)} | {_mean(metrics.spearman(predicted, actual))} | {alone} |")
    return "\n".join(lines)
