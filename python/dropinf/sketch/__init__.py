"""Sketches of one axis of a gradient."""

from .axis import Axis
from .sketch import PCA, SJLT, Dropout, Gaussian, Identity, Rademacher, Sketch

__all__ = ["PCA", "SJLT", "Axis", "Dropout", "Gaussian", "Identity", "Rademacher", "Sketch"]
