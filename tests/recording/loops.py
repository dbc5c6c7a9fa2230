"""Small training loops, and the oracle of their rows: one backward a sample through plain autograd, in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropinf

WORDS, WIDTH, SAMPLES = 31, 16, 6


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.before, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).split(WIDTH, -1)
        x = x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])
        return x + self.dropout(self.down(F.gelu(self.up(self.between(x)))))


class GPT(nn.Module):
    """Tied embeddings, and a table of positions that all samples share."""

    def __init__(self, dropout: float = 0.0, checkpointed: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.second, self.head = nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))).mean((2, 3)))


class TimeFirst(nn.Module):
    """Its layers see [T, n, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 9), nn.Linear(9, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.transpose(0, 1)).tanh()).mean(0))


Parts = Callable[[nn.Module, Any], Tensor]  # each sample's part of the loss [n]


def next_word(model: nn.Module, ids: Tensor) -> Tensor:
    losses = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")
    return losses.mean(1) / len(ids)


def by_word(model: nn.Module, ids: Tensor) -> Tensor:
    """Token-weighted: the mean over all words that count, of which samples have different numbers."""
    labels = ids[:, 1:].masked_fill(ids[:, 1:] < 8, -100)
    losses = F.cross_entropy(model(ids[:, :-1]).mT, labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels >= 0).sum()


def classes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / len(batch[1])


def summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def text(step: int) -> Tensor:
    length = (13, 6, 9, 7)[step % 4]  # 6: as many positions as samples
    return torch.randint(0, WORDS, (SAMPLES, length), generator=torch.Generator().manual_seed(step))


def vectors(step: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, *shape, generator=generator)
    return x, torch.randint(0, 5, (SAMPLES,), generator=generator)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, 5))


@dataclass
class Case:
    """A training loop: what it trains, on what, by which loss, and how."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    parts: Parts
    micro: int = 1  # batches that are accumulated
    clip: float | None = None
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = lambda groups: torch.optim.AdamW(
        groups, lr=1e-2
    )
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    scaled: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "mlp": Case(mlp, lambda s: vectors(s, 12), classes),
    "gpt": Case(GPT, text, next_word),
    "gpt, by word": Case(GPT, text, by_word),
    "gpt, checkpoints": Case(lambda: GPT(checkpointed=True), text, next_word),
    "convolutions": Case(Convolutions, lambda s: vectors(s, 3, 8, 8), classes),
    "time first": Case(TimeFirst, lambda s: vectors(s, 6, 7), classes),
    "sum, sgd": Case(
        mlp,
        lambda s: vectors(s, 12),
        summed,
        optimizer=lambda g: torch.optim.SGD(g, lr=1e-2, momentum=0.9, nesterov=True),
    ),
    "accumulated, clipped, adam": Case(
        GPT, text, next_word, micro=3, clip=0.5, optimizer=lambda g: torch.optim.Adam(g, lr=1e-2, weight_decay=0.1)
    ),
    "autocast": Case(GPT, text, next_word, context=lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast, scaled": Case(mlp, lambda s: vectors(s, 12), classes, clip=0.3, scaled=True),
    "muon": Case(mlp, lambda s: vectors(s, 12), classes, optimizer=lambda g: torch.optim.RMSprop(g, lr=1e-3)),
}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups: vectors do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 3e-3},
    ]


def train(
    case: Case,
    model: nn.Module,
    steps: int,
    *,
    out: Any = None,
    sketch: Any = None,
    before: Callable[[int], None] = lambda _: None,
    saved: dict[str, Any] | None = None,
    begin: int = 0,
) -> Any:
    """Run a loop, recorded if there is a folder for it; return the run. ``before``: called before each step's update."""
    optimizer = case.optimizer(groups_of(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if case.scaled else None
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        schedule.load_state_dict(saved["schedule"])
    options = {"scaler": scaler, **case.options}
    recording = (
        contextlib.nullcontext() if out is None else dropinf.record(model, sketch, optimizer, out=out, **options)
    )
    with recording as run:
        for step in range(begin, steps):
            optimizer.zero_grad()
            for i in range(case.micro):
                batch = case.batch(case.micro * step + i)
                if run is not None:
                    run.samples(ids_of(step, i))
                with case.context():
                    loss = case.parts(model, batch).sum() / case.micro
                (loss if scaler is None else scaler.scale(loss)).backward()
            if case.clip is not None:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            before(step)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            schedule.step()
            yield_state(saved_states, step, model, optimizer, schedule)
    return run, optimizer


saved_states: dict[int, dict[str, Any]] = {}


def yield_state(into: dict[int, dict[str, Any]], step: int, model: nn.Module, optimizer: Any, schedule: Any) -> None:
    into[step + 1] = copy.deepcopy(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    )


def ids_of(step: int, micro: int) -> list[str]:
    return [f"{step}.{micro}.{i}" for i in range(SAMPLES)]


def oracle(case: Case, model: nn.Module, step: int) -> Iterator[dict[str, Tensor]]:
    """Yield parameter name -> each sample's part of a step's gradient [n, *shape], of each batch, in float64."""
    wide = copy.deepcopy(model).double()
    for i in range(case.micro):
        batch = case.batch(case.micro * step + i)
        batch = tuple(x.double() if x.is_floating_point() else x for x in batch) if isinstance(batch, tuple) else batch
        found: dict[str, list[Tensor]] = {}
        for n in range(SAMPLES):
            for p in wide.parameters():
                p.grad = None
            (case.parts(wide, batch)[n] / case.micro).backward()
            for name, p in wide.named_parameters():
                found.setdefault(name, []).append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
        yield {name: torch.stack(parts) for name, parts in found.items()}
