"""Scores that no model is asked for: what similarity of the inputs alone predicts."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfTransformer
from torch import Tensor

from .tasks import Task


def similarity(found: Task) -> Tensor:
    """Cosine similarity of the inputs, [Q, N]: of TF-IDF vectors where they are words, of pixels otherwise."""
    train, query = found.train[0], found.query[0]
    if train.dtype == torch.int64:
        words = int(max(train.max(), query.max())) + 1
        counts = [np.stack([np.bincount(row, minlength=words) for row in x.numpy()]) for x in (train, query)]
        weights = TfidfTransformer(sublinear_tf=True).fit(counts[0])
        train, query = (torch.from_numpy(weights.transform(c).toarray()) for c in counts)
    train, query = (torch.nn.functional.normalize(x.flatten(1).double()) for x in (train, query))
    return query @ train.T


def bm25(train: list[np.ndarray], query: list[np.ndarray], k1: float = 1.5, b: float = 0.75) -> Tensor:
    """Scores [Q, N] of passages of token ids. Source: Robertson & Zaragoza (2009), with a positive idf."""
    size = 1 + max(int(row.max()) for row in (*train, *query))
    counts = np.stack([np.bincount(row, minlength=size) for row in train]).astype(np.float64)
    asked = np.stack([np.bincount(row, minlength=size) for row in query]).astype(np.float64)
    seen = (counts > 0).sum(0)
    idf = np.log1p((len(train) - seen + 0.5) / (seen + 0.5))
    lengths = counts.sum(1, keepdims=True)
    weights = counts * (k1 + 1) / (counts + k1 * (1 - b + b * lengths / lengths.mean()))
    return torch.from_numpy(asked @ (idf * weights).T)
