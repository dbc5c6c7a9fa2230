"""`dropinf.transformer.Workload` and the models of text, by their documented path."""

from .text.transformer import TextModel
from .workload import Workload

__all__ = ["TextModel", "Workload"]
