"""What the rows of an index come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ..origin import Origin
from ..workload import CuSeqlens


class RowSource(Protocol):
    """What the rows of an index come from: a compressor."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def is_sharded(self) -> bool: ...
    @property
    def cu_seqlens(self) -> CuSeqlens | None: ...

    def digest(self) -> Mapping[str, str]: ...
    def fingerprint(self) -> str: ...
    def origin(self) -> Origin: ...
    def loss_name(self) -> str: ...
    def version(self) -> int: ...
    def code(self) -> dict[str, str]: ...
    def losses(self, batch: Any) -> list[float]: ...
    def save(self, path: str | os.PathLike[str]) -> None: ...
    def stream(
        self,
        batches: Iterable[Any],
        take: Callable[[Tensor], None],
        *,
        progress: bool = ...,
        where: Callable[[int], str] | None = ...,
    ) -> None: ...
