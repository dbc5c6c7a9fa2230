"""Queries as directions in weight space."""

from .direction import Direction, direction

__all__ = ["Direction", "direction"]
