"""Whether every byte of an index's folder is as it was written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..files import checksum_of
from .discard import has_more_passages
from .folder import FISHER, PASSAGES, shard_path
from .kept import fisher_paths
from .manifest import Manifest
from .order import order_path, read_order
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
        paths = fisher_paths(folder, expected) if name == FISHER else [folder / name]
        found = list(map(checksum_of, paths))
        if not any(found):
            problems.append(f"{folder / name}: missing")
        elif name == PASSAGES and not manifest.unfinished and has_more_passages(folder, manifest):
            problems.append(
                f"{folder / name}: it has passages of an append that ended before its first row was made; run that "
                "append again, or take them out: dropinf index --discard"
            )
        elif expected not in found:
            problems.append(f"{folder / name}: damaged, its bytes do not match their checksum")
    problems += _problems_of_order(folder, manifest)
    for number in range(len(manifest.runs)):
        if not manifest.has_key(number):
            problems.append(f"{folder}: its manifest does not say of run {number} what its files were made with")
        problems += _problems(Plan(folder, manifest, number))
    if problems and _changed(folder, manifest):
        return verify(folder)  # while another process appended, or merged shards
    return problems


def _changed(folder: Path, manifest: Manifest) -> bool:
    with suppress(ValueError):
        return Manifest.load(folder) != manifest
    return False


def _problems_of_order(folder: Path, manifest: Manifest) -> list[str]:
    """Return what is wrong with the file of the samples' order."""
    if manifest.order is not None:
        try:
            read_order(folder, manifest.order, sum(shard.rows for shard in manifest.shards))
        except FileNotFoundError:
            return [f"{order_path(folder, manifest.order)}: missing"]
        except ValueError as error:
            return [str(error)]
    return []


def _problems(plan: Plan) -> list[str]:
    """Return what is wrong with the shards of a finished run."""
    problems, batches = [], 0
    for shard in plan.run.shards or ():
        file = ShardFile(shard_path(plan.folder, shard.number, shard.checksum), plan.manifest.codec, shard.rows)
        try:
            file.verify(shard.checksum)
            layout = file.layout()
            if plan.manifest.ids:
                file.texts(layout)
            counts = plan.own_header(file.path).batches
            batches += len(counts)
            if sum(counts) != shard.rows:
                problems.append(f"{file.path}: its batches have {sum(counts)} rows, and it has {shard.rows}")
        except FileNotFoundError:
            problems.append(f"{file.path}: missing")  # or merged meanwhile
        except ValueError as error:
            problems.append(str(error))
    if not problems and plan.run.shards is not None and plan.run.batches not in (None, batches):
        problems.append(f"{plan.folder}: its shards have {batches} batches, and a run of it has {plan.run.batches}")
    return problems
