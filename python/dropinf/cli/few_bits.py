"""The command that makes an index of few bits a row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..fisher.bits import BitCode
from .console import note, size_text
from .query import IndexFolder, open_index

Option = typer.Option
BITS: dict[Literal["1", "2", "4"], Literal[1, 2, 4]] = {"1": 1, "2": 2, "4": 4}


def requantize(
    index: IndexFolder,
    out: Annotated[Path, Option("--out", "-o", help="A new folder.")],
    bits: Annotated[Literal["1", "2", "4"], Option(help="Of a coordinate.")] = "1",
    size: Annotated[
        int | None, Option("--bytes", min=3, help="Of a sample; coordinates of least energy go. (default: keep all)")
    ] = None,
    kind: Annotated[
        Literal["kronecker", "block", "diagonal"], Option(help="Of the Fisher matrix that whitens rows.")
    ] = "kronecker",
    seed: Annotated[int, Option(min=0, help="Of the rotation.")] = 0,
) -> None:
    """Write an index of few bits a row beside another, without the model; its samples, ids and passages stay."""
    found = open_index(index)
    code = BitCode.fit(found, kind, bits=BITS[bits], bytes_per_sample=size, seed=seed)
    made = found.requantize(out, code)
    note(
        f"{out}: {len(made):,} samples, {size_text(code.bytes_per_sample)} each where they were "
        f"{size_text(found.bytes_per_sample)}, and {size_text(code.shared_bytes)} for all together"
    )
    note(f'next: dropinf query {out} --text "..."')
