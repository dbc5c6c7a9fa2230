"""Whether every byte of an index's folder is as it was written."""

from __future__ import annotations

import os
from pathlib import Path

from ..files import file_checksum
from .folder import shard_path
from .manifest import Manifest
from .runs import Plan
from .shards import ShardFile


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Return what is wrong with an index's folder, a line each; nothing where every byte is as it was written.

    Raises:
        FileNotFoundError: no index there.
    """
    folder = Path(path)
    try:
        manifest = Manifest.load(folder)
    except ValueError as error:
        return [str(error)]
    problems = []
    if manifest.unfinished:
        problems.append(f"{folder}: not finished; run the same compress again, which goes on where it stopped")
    for name, expected in manifest.files.items():
        if not (folder / name).is_file():
            problems.append(f"{folder / name}: missing")
        elif file_checksum(folder / name) != expected:
            problems.append(f"{folder / name}: damaged, its bytes do not match their checksum")
    for number in range(len(manifest.runs)):
        problems += _problems(Plan(folder, manifest, number))
    return problems


def _problems(plan: Plan) -> list[str]:
    """Return what is wrong with the shards of a finished run."""
    problems = []
    for i, shard in enumerate(plan.run.shards or (), plan.base):
        file = ShardFile(shard_path(plan.folder, i, shard.checksum), plan.manifest.codec, shard.rows)
        try:
            file.verify(shard.checksum)
            layout = file.layout()
            if plan.manifest.ids:
                file.texts(layout)
            counts = plan.own_header(file.path).batches
            if sum(counts) != shard.rows:
                problems.append(f"{file.path}: its batches have {sum(counts)} rows, and it has {shard.rows}")
        except ValueError as error:
            problems.append(str(error))
    return problems
