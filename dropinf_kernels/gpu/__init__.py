"""Triton kernels of the ops and their launchers; importing it gives every op its launcher, and takes long."""

from . import conv, embedding, flat, gram, linear, norm, quantize, sketch, topk

__all__ = ["conv", "embedding", "flat", "gram", "linear", "norm", "quantize", "sketch", "topk"]
