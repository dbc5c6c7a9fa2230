"""Influence functions on dropout-compressed per-sample gradients, for any PyTorch module."""

from .budget import Choice, choose
from .capture.ladder import AttributionError
from .capture.layer import Layer
from .compressor import Compressor, compress
from .fisher import Fisher, build_fisher
from .gradients import Gradients
from .index import Index
from .score import TopK, score, self_influence
from .sketch import PCA, SJLT, Axis, Dropout, Gaussian, Identity, Rademacher, Sketch

__version__ = "0.1.0"

__all__ = [
    "PCA",
    "SJLT",
    "AttributionError",
    "Axis",
    "Choice",
    "Compressor",
    "Dropout",
    "Fisher",
    "Gaussian",
    "Gradients",
    "Identity",
    "Index",
    "Layer",
    "Rademacher",
    "Sketch",
    "TopK",
    "build_fisher",
    "choose",
    "compress",
    "score",
    "self_influence",
]
