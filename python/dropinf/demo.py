"""The demo: find flipped labels in handwritten digits with four compressions of the same gradients."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

import dropinf

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo; one damping and one dim serve every method, so that none is favoured."""

    seed: int = 0
    train_size: int = 1200
    flip_fraction: float = 0.1
    epochs: int = 12
    batch_size: int = 100
    dim: int = 16
    damping: float = 0.1
    repeats: int = 3


@dataclass(frozen=True)
class Digits:
    """Images `[N, 1, 8, 8]` in `[0, 1]`; `given` are the training labels after flipping, `true` before."""

    images: Tensor
    given: Tensor
    true: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def flipped(self) -> Tensor:
        """Bool `[N]`: which training labels are wrong."""
        return self.given != self.true


@dataclass(frozen=True)
class Attribution:
    """What one method found: `self_influence` `[N]`, `scores` `[Q, N]`, and what it cost."""

    seconds: float
    bytes_per_sample: int
    self_influence: Tensor
    scores: Tensor


@dataclass(frozen=True)
class DemoResult:
    """Everything that the table, the JSON file and the report show."""

    config: DemoConfig
    data: Digits
    predictions: Tensor
    loss_auc: float
    methods: dict[str, Attribution]
    seconds: float

    @property
    def test_accuracy(self) -> float:
        """Share of the test images that the model gets right."""
        return float((self.predictions == self.data.test_labels).double().mean())

    def auc(self, method: str) -> float:
        """ROC AUC of finding the flipped labels by the self-influence of `method`."""
        return float(roc_auc_score(self.data.flipped, self.methods[method].self_influence))

    def correlation(self, method: str) -> float:
        """Spearman correlation with the uncompressed scores over the training set, averaged over queries."""
        return rank_correlation(self.methods[method].scores, self.methods["uncompressed"].scores)

    def ratio(self, method: str) -> float:
        """How many times smaller than uncompressed a gradient of `method` is."""
        return self.methods["uncompressed"].bytes_per_sample / self.methods[method].bytes_per_sample


def load_data(config: DemoConfig) -> Digits:
    """Shuffle scikit-learn's digits, split them, and flip training labels, each to another class."""
    generator = torch.Generator().manual_seed(config.seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.from_numpy(digits.images).float()[order].unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()[order]
    n, flips = config.train_size, round(config.train_size * config.flip_fraction)
    given = labels[:n].clone()
    chosen = torch.randperm(n, generator=generator)[:flips]
    given[chosen] = (given[chosen] + torch.randint(1, 10, (flips,), generator=generator)) % 10
    return Digits(images[:n], given, labels[:n], images[n:], labels[n:])


def build_model() -> nn.Module:
    """Return an untrained CNN of 8,746 parameters for 8x8 digits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def sample_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of each sample, `[N]`."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def train_model(config: DemoConfig, data: Digits, progress: Progress) -> nn.Module:
    """Train on the given labels, flipped ones included; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model()
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in progress.track(range(config.epochs), description="train the model"):
        for rows in torch.randperm(len(data.given), generator=generator).split(config.batch_size):
            optimizer.zero_grad()
            sample_loss(model, (data.images[rows], data.given[rows])).mean().backward()
            optimizer.step()
    return model.eval()


def sketches(config: DemoConfig) -> "dict[str, dropinf.Sketch]":
    """Return the four compressions by their name in the results."""
    return {
        "dropout": dropinf.Dropout(dim=config.dim, seed=config.seed),
        "gaussian": dropinf.Gaussian(dim=config.dim, seed=config.seed),
        "pca": dropinf.PCA(dim=config.dim, seed=config.seed),
        "uncompressed": dropinf.Identity(),
    }


def make_batches(config: DemoConfig, images: Tensor, labels: Tensor) -> list[Batch]:
    """Cut images and labels into batches."""
    return list(zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True))


def compress(
    model: nn.Module, sketch: "dropinf.Sketch", batches: list[Batch], tick: Iterable[Any] | None = None
) -> "tuple[dropinf.Compressor, dropinf.Gradients]":
    """Compress `batches`; PCA sees them twice, as it must learn its axes first."""
    compressor = dropinf.Compressor(model, sketch, sample_loss)
    if isinstance(sketch, dropinf.PCA):
        compressor.calibrate(batches)
    return compressor, compressor.compress(batches)
