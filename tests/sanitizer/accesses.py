"""No kernel leaves its arguments, and no two programs of a launch share an element that one of them writes."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.sanitizer.clients import bounds, symbols

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def check_bounds(cases: ModuleType, dtype: torch.dtype) -> None:
    """Run the small cases, and look at each access that they make."""
    problems = []
    for case in cases.small(dtype):
        with bounds() as client:
            case.call()
        assert client.accesses, f"{case.name} ran no kernel"
        problems += [f"{case.name}: {error}" for error in client.errors]
    assert not problems, "\n".join(problems)


def check_symbols(cases: ModuleType, *names: str) -> None:
    """Check the named cases for all programs and lanes at once.

    triton-viz's symbolic client can follow kernels whose loads depend on no other load, and no others.
    """
    chosen = [case for case in cases.small(torch.float32) if case.name in names]
    assert len(chosen) == len(names)
    for case in chosen:
        with symbols() as client:
            case.call()
        assert not client.records, f"{case.name}: {client.records}"
