"""The models that extraction is timed on, and a batch of each. Imports torch alone, so that peers' environments can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """``linears``: names of the layers that every contender compresses, to ``dim`` x ``dim`` each."""

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    loss_fn: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]  # losses [N]
    linears: tuple[str, ...]
    dim: int

    @property
    def samples(self) -> int:
        return len(self.batch[0])


class Block(nn.Module):
    """GPT-2's: layer norm first, one linear for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.before(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def next_word(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over positions."""
    logits = model(batch[0])
    logits = getattr(logits, "logits", logits)
    losses = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="none")
    return losses.view_as(batch[1]).mean(1)


def classification(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def gpt() -> Case:
    """Four layers, 256 wide, 128 passages of 128 tokens; the sixteen linears of the blocks, 64 x 64 each."""
    torch.manual_seed(0)
    model = GPT(2048, 128, 256, 4, 4).eval()
    ids = torch.randint(2048, (2, 128, 128))
    names = tuple(f"blocks.{i}.{name}" for i in range(4) for name in ("qkv", "out", "up", "down"))
    return Case("gpt", model, (ids[0], ids[1]), next_word, names, 64)


def smollm2() -> Case:
    """SmolLM2-135M's shape at random weights, which cost the same: 8 passages of 128 tokens, 210 linears, 16 x 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(49152, (2, 8, 128))
    names = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n)
    return Case("smollm2", model, (ids[0], ids[1]), next_word, names, 16)


def resnet9() -> Case:
    """Of 64 channels to 512, as for CIFAR, on 64 images; every convolution and the output layer, 16 x 16."""
    torch.manual_seed(0)

    def conv(a: int, b: int, *, pool: bool = False) -> nn.Sequential:
        parts = [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.GroupNorm(4, b), nn.ReLU()]
        return nn.Sequential(*parts, *([nn.MaxPool2d(2)] if pool else []))

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    w = 64
    model = nn.Sequential(
        conv(3, w), conv(w, 2 * w, pool=True), Residual(conv(2 * w, 2 * w), conv(2 * w, 2 * w)),
        conv(2 * w, 4 * w, pool=True), conv(4 * w, 8 * w, pool=True), Residual(conv(8 * w, 8 * w), conv(8 * w, 8 * w)),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8 * w, 10),
    ).eval()  # fmt: skip
    names = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
    batch = (torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))
    return Case("resnet9", model, batch, classification, names, 16)


def wide() -> Case:
    """10,000 samples of 16 layers of 64 x 64, kept whole, 4096 numbers each: where the Fisher matrix is the work."""
    torch.manual_seed(0)

    class Pooled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            pooled: Tensor = super().forward(x).mean(1)
            return pooled

    model = Pooled(*(m for _ in range(16) for m in (nn.Linear(64, 64, bias=False), nn.Tanh()))).eval()
    batch = (torch.randn(10_000, 16, 64), torch.randint(64, (10_000,)))
    return Case("wide", model, batch, classification, tuple(str(2 * i) for i in range(16)), 64)


CASES = {"gpt": gpt, "smollm2": smollm2, "resnet9": resnet9}
