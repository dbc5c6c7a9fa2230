"""Indexes that are changed by chance, one for each seed of a range."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from tests.faults.mutations import FORGED, KINDS, STRICT
from tests.faults.uses import Bench


def fuzz(folder: str, dtype: str, first: int, count: int, resumes: int) -> None:
    """Mutate an index by each seed of a range; every one of `resumes` is compressed into again, too."""
    bench = Bench(Path(folder), dtype)
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        chance = random.Random(seed)
        kind = chance.choice(KINDS)
        changed = {**STRICT, **FORGED}[kind](chance, bench.index)
        refused = bench.attempt(f"seed {seed}", kind, changed, seed % resumes == 0)
        outcomes[f"{kind}: {'refused' if refused else 'as before' if kind in STRICT else 'accepted'}"] += 1
    bench.end(f"{count} indexes: {dict(sorted(outcomes.items()))}")
