"""Compressed gradients on disk."""

from .reader import Index
from .sound import verify
from .writer import write_index

__all__ = ["Index", "verify", "write_index"]
