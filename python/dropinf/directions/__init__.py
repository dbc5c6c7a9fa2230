"""Queries as directions in weight space, and the exact products of gradients with them."""

from .direction import Direction, direction
from .refine import Refined, refine
from .rerank import rerank, tokens

__all__ = ["Direction", "Refined", "direction", "refine", "rerank", "tokens"]
