"""Influence functions on dropout-compressed per-sample gradients, for any PyTorch module."""

from .compressor import Compressor, compress
from .fisher import Fisher, build_fisher
from .gradients import Gradients
from .layers import Layer
from .score import TopK, score, self_influence
from .sketch import PCA, SJLT, Axis, Dropout, Gaussian, Identity, Rademacher, Sketch

__version__ = "0.1.0"

__all__ = [
    "PCA",
    "SJLT",
    "Axis",
    "Compressor",
    "Dropout",
    "Fisher",
    "Gaussian",
    "Gradients",
    "Identity",
    "Layer",
    "Rademacher",
    "Sketch",
    "TopK",
    "build_fisher",
    "compress",
    "score",
    "self_influence",
]
