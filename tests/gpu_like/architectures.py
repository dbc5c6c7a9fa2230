"""Small models of kinds whose tensors a GPU's kernels meet in other layouts: name -> (model, batch, loss_fn)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.api.models import N, causal_lm

Case = tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]
TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip


def of_text(model: nn.Module) -> Case:
    return model, {"input_ids": torch.randint(1, 40, (N, 6))}, causal_lm


def gemma3(t: Any) -> Case:
    return of_text(t.Gemma3ForCausalLM(t.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4)))


def qwen3(t: Any) -> Case:
    return of_text(t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, head_dim=8)))


def mixtral(t: Any) -> Case:
    return of_text(t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=4)))


def swin(t: Any) -> Case:
    config = t.SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=2)
    batch = torch.randn(N, 3, 16, 16), torch.randint(0, 2, (N,))
    return t.SwinForImageClassification(config), batch, classified


def classified(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(pixel_values=batch[0]).logits, batch[1], reduction="none")


ARCHITECTURES = {f.__name__: f for f in (gemma3, qwen3, mixtral, swin)}


def build(name: str) -> Case:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    torch.manual_seed(1)
    model, batch, loss_fn = ARCHITECTURES[name](transformers)
    return model.eval(), batch, loss_fn
