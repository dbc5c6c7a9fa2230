"""Text: passages, and the models of transformers that read them."""

from .passage_file import write_passages
from .passages import Passage, read_passages
from .transformer import TextModel

__all__ = ["Passage", "TextModel", "read_passages", "write_passages"]
