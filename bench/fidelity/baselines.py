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
