"""Adapters for other influence toolkits, one module each. None is imported, nor its toolkit, before it is asked for."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType


def require(module: str, package: str, tested: str) -> ModuleType:
    """Return a toolkit's module.

    Args:
        module: what is imported, for instance "trak".
        package: its name on PyPI, for instance "traker".
        tested: the version that the adapter is tested with; one that differs before its last dot is refused.

    Raises:
        ImportError: not installed, or of another version; one line that says what to install.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} is not installed; run: pip install {package}=={tested}") from None
    if found.rpartition(".")[0] != tested.rpartition(".")[0]:
        raise ImportError(
            f"{package} is {found}; this adapter reaches into that of {tested}: pip install {package}=={tested}"
        )
    return import_module(module)
