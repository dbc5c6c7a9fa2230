"""Triton kernels of the ops and their launchers; importing it gives every op its launcher, and takes long."""

from . import bits, conv, embedding, flat, gram, linear, norm, quantize, sketch, topk

__all__ = ["bits", "conv", "embedding", "flat", "gram", "linear", "norm", "quantize", "sketch", "topk"]
