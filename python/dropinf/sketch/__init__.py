"""Sketches of one axis of a gradient."""

from .axis import Axis
from .draws import Place
from .sketch import PCA, SJLT, Dropout, Gaussian, Identity, Rademacher, Sketch

__all__ = ["PCA", "SJLT", "Axis", "Dropout", "Gaussian", "Identity", "Place", "Rademacher", "Sketch"]
