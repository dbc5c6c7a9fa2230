"""Passages, a small GPT-2, and what dattri-llm captures of it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from dattri_llm import (
    AttributionArguments,
    AttributionTask,
    HookManager,
    HookManagerConfig,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import dropinf

ROOT = Path(__file__).resolve().parents[3]


LAYERS = [r"\.(attn|mlp)\."]


SKETCHES = [
    dropinf.Dropout(6),
    dropinf.Dropout((8, 4), group=4),
    dropinf.Dropout(6, keep=0.5, scale=True),
    dropinf.Dropout(4, rank=8, whiten=True),
    dropinf.Gaussian(5),
    dropinf.SJLT(6),
]


class Rows(list):
    """Samples as dattri-llm's loaders take them."""


def text(start, stop, length=32):
    """Passages of this repository's LICENSE, as bytes."""
    letters = torch.tensor(list((ROOT / "LICENSE").read_bytes())).clamp(max=127)
    return Rows({"input_ids": row, "labels": row} for row in letters.split(length)[start:stop])


def batches(rows, size=8):
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [{key: torch.stack([row[key] for row in chunk]) for key in chunk[0]} for chunk in chunks]


def losses(model, batch):
    """One mean over its positions for each passage."""
    logits = model(batch["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").mean(1)


def total(model, batch):
    return losses(model, batch).sum()


def gpt():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=128, n_positions=32, use_cache=False)
    return GPT2LMHeadModel(config).eval()


def close(found, wanted, rtol=1e-5):
    assert found.shape == wanted.shape
    error = float((found - wanted).norm() / wanted.norm())
    assert error < rtol
    return error


def arguments(folder, **options):
    return AttributionArguments(
        output_dir=str(folder), per_device_train_batch_size=8, per_device_eval_batch_size=8, use_cpu=True, **options
    )


def base(capture_style="factorized", **options):
    return HookManagerConfig(linear_io=LAYERS, capture_style=capture_style, **options)


def compressor_of(model, sketch, data, loss_fn=losses, layers=("*.attn.*", "*.mlp.*")):
    compressor = dropinf.Compressor(model, sketch, loss_fn, layers=layers)
    compressor.calibrate(data)
    return compressor


def captured(model, config, data, loss=total):
    """Layer -> [N, k]: what the hooks hold after each batch."""
    manager, found = HookManager(model, config=config), []
    with manager.collect(deregister_on_exit=True):
        for batch in data:
            model.zero_grad()
            loss(model, batch).backward()
            gradient = manager.get_gradient().materialize()
            found.append({name: gradient.data[name] for name in gradient.layer_names})
    model.zero_grad()
    assert all(type(rows) is torch.Tensor for part in found for rows in part.values())
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def expected(compressor, data, whole):
    """dropinf's gradients in dattri-llm's layout: the bias, masked as the weight's outputs, is the last column."""
    gradients, wanted = compressor.compress(data), {}
    for name, plan in compressor.layers.items():
        if plan.kind == "linear":
            bias = f"{name}.bias"
            columns = [gradients[name]]
            if bias in whole.shapes:
                columns.append(plan.out_axis.apply(whole[bias]).to(gradients.dtype).unsqueeze(2))
            wanted[name] = torch.cat(columns, 2).flatten(1)
    return wanted


def scores_of(model, config, attributor, options, train, query, folder):
    made = attributor(arguments(folder), task=AttributionTask(total, model))
    return made.attribute(train, query, hook_config=config, **options).agnostic_matrix()[1]


DAMPED = {"damping": 0.1, "relative_damping": True}


class Odd(nn.Module):
    """Layers of every kind, one of them called twice, under checkpointing where asked."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        self.embed, self.norm = nn.Embedding(128, 16), nn.LayerNorm(16)
        self.twice, self.head = nn.Linear(16, 16), nn.Linear(16, 128, bias=False)

    def inner(self, x):
        return torch.tanh(self.twice(self.norm(x)))

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x))


def odd_losses(model, batch):
    return F.cross_entropy(model(batch["input_ids"]).mean(1), batch["labels"][:, 0], reduction="none")


def gaussian(feature, batch_size, *, proj_dim, proj_seed=0, device="cpu", **_):
    """dattri's protocol for its normal projection; dattri itself is not installed here."""
    generator = torch.Generator().manual_seed(proj_seed)
    matrix = torch.randn(feature.shape[1], proj_dim, generator=generator) / proj_dim**0.5
    return lambda x: x @ matrix


class Pooled(nn.Module):
    """[N, T, 512] -> [N, 512]."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(512, 2048), nn.Linear(2048, 512)

    def forward(self, x):
        return self.down(F.gelu(self.up(x))).mean(1)


THEIRS = {
    "logra": {"style": "logra", "proj_dim": 64},
    "mask": {"style": "mask", "proj_dim": 64 * 65},
}
