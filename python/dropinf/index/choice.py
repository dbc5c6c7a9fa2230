"""Which run of an index a call is of: the one that all of its batches agree with, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..workload import Ids, batch_checksum, count_of
from .fingerprint import fingerprint
from .finished import Finished
from .manifest import Call, Manifest, Run
from .runs import Plan, plans_of

IdsFrom = Callable[[int], Ids | None]  # how many samples stand before a run -> what names its samples


def choose_run(
    folder: Path,
    manifest: Manifest,
    batches: Iterable[Any],
    first: Any,
    ids_from: IdsFrom,
    append: bool,
) -> Plan | str | None:
    """Return the run that these batches are of, which begin with `first`.

    Where finished runs begin alike and more may be added, every batch is compared before one is taken for it. None, or
    how the batches differ from the run that is most like them, where there is no such run.
    """
    alike = runs_alike(folder, manifest, batches, first)
    done = [plan for plan in alike if plan.run.shards is not None]
    begun = [plan for plan in alike if plan.run.shards is None]
    if not done or (len(alike) == 1 and not append):
        return alike[0] if alike else None
    old = [plan for plan in done if not plan.began.printed]
    difference = None
    if not isinstance(batches, Iterator):
        found, difference = _agreeing(done, batches, ids_from)
        if found is not None:
            return replace(found, every=append and not found.began.printed)
    elif not append:
        return done[-1]  # its batches are compared as they come
    elif old and not begun:
        return replace(old[-1], every=True)
    if begun:
        return replace(begun[0], undecided=isinstance(batches, Iterator))
    return difference


def runs_alike(folder: Path, manifest: Manifest, batches: Iterable[Any], first: Any) -> list[Plan]:
    """Return the runs that begin with the same batch and have, where both are known, as many."""
    count = count_of(batches)
    new = fingerprint(first, named=manifest.ids)
    old = "" if all(run.printed for run in manifest.runs) else batch_checksum(first)

    def same(run: Run | Call) -> bool:
        return run.first == (new if run.printed else old) and (None in (count, run.batches) or count == run.batches)

    return [plan for plan in plans_of(folder, manifest) if same(plan.began)]


def _agreeing(plans: list[Plan], batches: Iterable[Any], ids_from: IdsFrom) -> tuple[Plan | None, str | None]:
    """Return the first run that agrees with every batch, or how the batches differ from the one that agrees longest."""
    left = [Finished(plan) for plan in plans]
    names = {id(run): ids_from(run.plan.first_sample) for run in left}
    difference, b = None, -1
    for b, batch in enumerate(batches):
        found = fingerprint(batch, named=plans[0].manifest.ids)
        for run in list(left):
            other = _difference(run, b, batch, found, names[id(run)])
            if other is not None:
                left.remove(run)
                difference = other
        if not left:
            return None, difference
    for run in left:
        if max(run, default=-1) <= b:
            return run.plan, None
    return None, f"batches: there are {b + 1}, and more were stored"


def _difference(run: Finished, b: int, batch: Any, found: str, ids: Ids | None) -> str | None:
    if b in run:
        return run.difference(b, found, None if ids is None else ids(batch))
    return None if run.missing(b) else f"batches: there are more than the {b} that were stored"
