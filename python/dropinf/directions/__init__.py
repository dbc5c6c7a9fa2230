"""Queries as directions in weight space, and the exact products of gradients with them."""

from .direction import Direction, direction
from .rerank import rerank, tokens

__all__ = ["Direction", "direction", "rerank", "tokens"]
