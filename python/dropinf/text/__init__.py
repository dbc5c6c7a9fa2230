"""Text: passages, and the models of transformers that read them."""

from .passages import Passage, read_passages, write_passages
from .transformer import TextModel

__all__ = ["Passage", "TextModel", "read_passages", "write_passages"]
