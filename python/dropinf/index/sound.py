"""Whether every byte of an index's folder is as it was written."""

from __future__ import annotations

import os
from pathlib import Path

from ..files import file_checksum
from .folder import shard_path
from .manifest import Manifest
from .order import order_path, read_order
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
    if manifest.order is not None:
        try:
            read_order(folder, manifest.order, sum(shard.rows for shard in manifest.shards))
        except FileNotFoundError:
            problems.append(f"{order_path(folder, manifest.order)}: missing")
        except ValueError as error:
            problems.append(str(error))
    for i, shard in enumerate(manifest.shards):
        file = ShardFile(shard_path(folder, i, shard.checksum), manifest.codec, shard.rows)
        try:
            file.verify(shard.checksum)
            layout = file.layout()
            if manifest.ids:
                file.texts(layout)
        except ValueError as error:
            problems.append(str(error))
    return problems
