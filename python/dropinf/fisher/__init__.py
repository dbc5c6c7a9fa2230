"""The curvature of compressed gradients."""

from .fisher import Fisher, FisherKind, build_fisher

__all__ = ["Fisher", "FisherKind", "build_fisher"]
