"""Models small enough to retrain hundreds of times on two cores, on real data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from . import data

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """Training samples, queries, and how a model is trained: deterministic in (kept samples, seed)."""

    name: str
    train: Batch
    query: Batch
    build: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Batch], Tensor]
    epochs: int
    batch: int
    rate: float
    decay: float = 0.0

    def fit(self, kept: Tensor, seed: int) -> nn.Module:
        """Train on the samples of the mask bool [N]."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
            rows = kept.nonzero().flatten()
            steps = self.epochs * -(-len(rows) // self.batch)
            optimizer = torch.optim.AdamW(model.parameters(), self.rate, weight_decay=self.decay)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=steps)
            model.train()
            for _ in range(self.epochs):
                for part in rows[torch.randperm(len(rows))].split(self.batch):
                    optimizer.zero_grad()
                    self.loss_fn(model, tuple(x[part] for x in self.train)).mean().backward()
                    optimizer.step()
                    schedule.step()
        return model.eval().requires_grad_(True)

    def losses(self, model: nn.Module) -> Tensor:
        """The loss of every query, [Q]."""
        with torch.no_grad():
            return torch.cat([self.loss_fn(model, b) for b in self.batches("query")])

    def batches(self, which: str, size: int = 50) -> list[Batch]:
        """All "train" samples or all "query" samples."""
        tensors = self.train if which == "train" else self.query
        return list(zip(*(x.split(size) for x in tensors), strict=True))


def classification(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def word_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of predicting each word of a chunk but its first, [N, T]."""
    (chunk,) = batch
    logits = model(chunk[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="none").view(len(chunk), -1)


def next_word(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over positions, so that a sample's loss does not grow with its length."""
    return word_losses(model, batch).mean(1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A GPT-2 shape: learned positions, layer norm first, an output layer of its own."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ResNet9(nn.Module):
    """Group norm in place of batch norm, which mixes samples."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def conv(a: int, b: int, pool: bool = False) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1, bias=False),
                nn.GroupNorm(4, b),
                nn.ReLU(),
                nn.MaxPool2d(2) if pool else nn.Identity(),
            )

        w = width
        self.stem = nn.Sequential(conv(1, w), conv(w, 2 * w, pool=True))
        self.first = nn.Sequential(conv(2 * w, 2 * w), conv(2 * w, 2 * w))
        self.middle = nn.Sequential(conv(2 * w, 4 * w, pool=True), conv(4 * w, 8 * w, pool=True))
        self.second = nn.Sequential(conv(8 * w, 8 * w), conv(8 * w, 8 * w))
        self.head = nn.Linear(8 * w, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.middle(x + self.first(x))
        return self.head((x + self.second(x)).amax((2, 3)))


def _digits() -> Task:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x).float() / 16, torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, query = order[:500], order[500:600]
    # Full batches: a convex problem, trained until leave-one-out retraining is not noise.
    return Task(
        "digits",
        (x[train], y[train]),
        (x[query], y[query]),
        lambda: nn.Linear(64, 10),
        classification,
        300,
        500,
        0.05,
        0.01,
    )


def _fashion(name: str, build: Callable[[], nn.Module], n: int, epochs: int, rate: float) -> Task:
    (x, y), (qx, qy) = data.fashion_mnist("train"), data.fashion_mnist("t10k")
    return Task(name, (x[:n], y[:n]), (qx[:100], qy[:100]), build, classification, epochs, 64, rate, 0.001)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def _brown() -> Task:
    chunks = data.brown(context=32, vocabulary=2048)[:1100]
    queries = torch.arange(1100) % 11 == 5  # other passages of the same texts
    build = lambda: GPT(2048, 32, 64, 2, 4)  # noqa: E731
    return Task("gpt-brown", (chunks[~queries],), (chunks[queries],), build, next_word, 6, 16, 5e-3, 0.01)


def _words() -> Task:
    """Genres from bags of words: nearly every input is zero, and a few words say the most."""
    chunks, genres = data.brown_genres(context=127, vocabulary=4096)
    chosen = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0))[:1100]
    counts = torch.zeros(1100, 4096).scatter_add_(1, chunks[chosen], torch.ones(1100, 128))
    x, y = counts[:, 1:].sqrt(), genres[chosen]
    return Task(
        "words-brown", (x[:1000], y[:1000]), (x[1000:], y[1000:]), lambda: nn.Linear(4095, 15, bias=False),
        classification, 20, 64, 3e-3, 0.01,
    )  # fmt: skip


_TASKS: dict[str, Callable[[], Task]] = {
    "digits": _digits,
    "mlp-fashion": lambda: _fashion("mlp-fashion", _mlp, 1000, 20, 3e-3),
    "resnet9-fashion": lambda: _fashion("resnet9-fashion", lambda: ResNet9(8), 1000, 10, 1e-2),
    "gpt-brown": _brown,
    "words-brown": _words,
}
NAMES = tuple(_TASKS)


@cache
def task(name: str) -> Task:
    return _TASKS[name]()
