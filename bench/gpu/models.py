"""The models that extraction is measured on, of torch alone: a Llama of a billion weights, and ResNet-50."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.endtoend.models import classification, next_word

from .clock import Machine

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """``floor``: the module whose output, or "" for the input, is the first to get a gradient on the floor."""

    name: str
    model: nn.Module
    batches: list[Batch]
    loss_fn: Callable[[nn.Module, Batch], Tensor]
    layers: list[str]  # name patterns of what is compressed
    dim: int
    floor: str


class Attention(nn.Module):
    """Grouped queries, rotated by their positions."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, groups * self.size, bias=False)
        self.v_proj = nn.Linear(width, groups * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            proj(x).unflatten(2, (-1, self.size)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, turn), rotated(k, turn)
        k, v = (y.repeat_interleave(self.heads // self.groups, 1) for y in (k, v))
        out: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return out


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, inner: int) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, heads, groups)
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.before(x), turn)
        y = self.after(x)
        out: Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return out


class Llama(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, groups: int, inner: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, groups, inner) for _ in range(layers))
        self.norm, self.size = nn.RMSNorm(width, eps=1e-5), width // heads

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        steps = torch.arange(0, self.size, 2, device=ids.device) / self.size
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] / 10_000**steps
        turn = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, turn)
        return F.linear(self.norm(x), self.tokens.weight)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out = 4 * inner
        self.conv1, self.norm1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.norm2, self.norm3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(out)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.short = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.short(x))


class ResNet(nn.Sequential):
    """ResNet-50 with ``width`` 64 and ``depths`` 3, 4, 6, 3."""

    def __init__(self, width: int, depths: tuple[int, ...], classes: int) -> None:
        stem = (nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks, channels = [], width
        for stage, depth in enumerate(depths):
            inner = width << stage
            for i in range(depth):
                blocks.append(Bottleneck(channels, inner, 2 if stage and not i else 1))
                channels = 4 * inner
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def llama(machine: Machine, batches: int, samples: int = 8, tokens: int = 1024) -> Workload:
    """Llama 3.2 1B's shape at random weights in bfloat16; the linears of its blocks, 64 x 64 each."""
    sizes = (256, 64, 2, 4, 2, 96) if machine.dry else (128_256, 2048, 16, 32, 8, 8192)
    torch.manual_seed(0)
    with machine.device:
        model = Llama(*sizes).to(torch.float32 if machine.dry else torch.bfloat16).eval()
        shape = (2, machine.size(samples, 2), machine.size(tokens, 8))
        data = [torch.randint(sizes[0], shape).unbind() for _ in range(batches)]
    pairs = [(ids, following) for ids, following in data]
    return Workload("Llama 1B", model, pairs, next_word, ["*_proj.weight"], machine.size(64, 8), "tokens")


def resnet(machine: Machine, batches: int, samples: int = 64) -> Workload:
    """ResNet-50 in float32; its convolutions and output layer, 16 x 16 each."""
    torch.manual_seed(0)
    side = machine.size(224, 64)
    with machine.device:
        model = (ResNet(8, (1, 1), 10) if machine.dry else ResNet(64, (3, 4, 6, 3), 1000)).eval()
        count, classes = machine.size(samples, 2), model[-1].out_features
        pairs = [(torch.randn(count, 3, side, side), torch.randint(classes, (count,))) for _ in range(batches)]
    names = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return Workload("ResNet-50", model, pairs, classification, names, machine.size(16, 4), "")


WORKLOADS = {"Llama 1B": llama, "ResNet-50": resnet}
