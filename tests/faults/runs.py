"""What tests of killed runs share: how far a run has come, and the operations on files that it does."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from dropinf.index.manifest import Manifest
from tests.faults.forks import Forks

# What ends a rank whose neighbour was killed.
LOST = re.compile(
    r"RuntimeError: (rank \d was not heard of for \d+ s|rank \d failed: .*|another rank is gone \(.*\)|"
    r"the store of torch.distributed is gone \(.*\)); this rank \(\d\) stops too. Run it again"
)


def phase(folder: Path) -> str:
    """How far a run has come."""
    try:
        manifest = Manifest.load(folder)
    except FileNotFoundError:
        return "beginning"
    if not manifest.unfinished:
        return "ended"
    shards, parts = (len(list(folder.glob(f"{name}/0*"))) for name in ("shards", "parts"))
    if shards == sum(-(-run.batches // run.shard_batches) for run in manifest.runs):
        return "finishing"
    return f"{'some' if shards else 'no'} shards, {'some' if parts else 'no'} parts"


def done(folder: Path) -> int:
    """How many batches of a run are on disk, in shards of three or as parts."""
    return 3 * len(list(folder.glob("shards/0*"))) + len(list(folder.glob("parts/0*")))


def reached(phases: Counter[str], least: int) -> None:
    """Kills hit runs in the midst of it: with parts, and with shards."""
    assert sum(n for name, n in phases.items() if "some parts" in name) >= least, phases
    assert sum(n for name, n in phases.items() if "some shards" in name) >= least, phases


def listed(forks: Forks, folder: Path, **options) -> list[tuple]:
    """Run to the end, and return its operations on files."""
    trace = folder.with_name("trace")
    assert forks.run("index", folder, trace=trace, **options).status == 0
    return [ast.literal_eval(line) for line in trace.read_text().splitlines()]
