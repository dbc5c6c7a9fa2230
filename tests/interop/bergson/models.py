"""bergson 2.5.1: a model, its data, and what is read back."""

from __future__ import annotations

from pathlib import Path

import bergson
import torch
from bergson import (
    GradientProcessor,
    IndexConfig,
    PreprocessConfig,
    ScoreConfig,
    load_gradients,
    load_module_gradients,
)
from bergson.build import build
from bergson.data import load_scores
from bergson.score.score import score_dataset
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import dropinf
from dropinf.interop import bergson as adapter

LICENSE = Path(__file__).resolve().parents[3] / "LICENSE"


CONFIGS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 48, "num_attention_heads": 4}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_inner": 48, "num_attention_heads": 4}),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {"intermediate_size": 48, "num_attention_heads": 4}),
}


def make_model(kind="llama", dtype=torch.float64, **options):
    model, config, more = CONFIGS[kind]
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128}
    made = model(config(**{**sizes, **more, **options})).eval().to(dtype)
    made.requires_grad_(False)
    made.get_input_embeddings().requires_grad_(True)  # as bergson's setup_model_and_peft leaves it
    return made


def make_data(n=24, start=0, least=10, most=40):
    """Bytes of a text in passages of several lengths."""
    text = LICENSE.read_bytes()[start:]
    lengths = [least + 7 * i % (most - least + 1) for i in range(n)]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    ids = [list(text[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "length": lengths})


def batches_of(data, size=5):
    return [list(range(i, min(i + size, len(data)))) for i in range(0, len(data), size)]


def index(path, model, data, compressor=None, *, processor=None, **options):
    """Build an index with bergson's collect_gradients, or with ours; returns its folder."""
    cfg = IndexConfig(run_path=str(path), **options)
    cfg.partial_run_path.mkdir(parents=True)
    if processor is None:
        processor = GradientProcessor(projection_dim=options.get("projection_dim"))
    if compressor is None:
        bergson.collect_gradients(model, data, processor, cfg, batches=batches_of(data))
    else:
        adapter.collect_gradients(model, data, processor, cfg, batches=batches_of(data), compressor=compressor)
    return cfg.partial_run_path


def stored(path):
    return torch.from_numpy(load_gradients(path).copy())


def as_queries(path):
    grads = load_module_gradients(path)
    return {name: torch.from_numpy(grads[name].copy()) for name in grads}


def error_of(got, want):
    return float((got - want).abs().max() / want.abs().max())


CFG = IndexConfig(run_path="unused")


SKETCHES = {
    "dropout": dropinf.Dropout(8),
    "runs": dropinf.Dropout((8, 16), group=8),
    "flat": dropinf.Dropout(64, mode="flat"),
    "rotated": dropinf.Dropout(8, rank=24, whiten=True),
    "rotated outputs": dropinf.Dropout(8, rank=(24, 8)),
    "gaussian": dropinf.Gaussian(8),
}


def run_pipeline(config, path, context, **options):
    """bergson's own two steps: a query index, and scores of the training set against it."""
    with context:
        build(config("queries", "query", **options), PreprocessConfig())
        score_dataset(
            config("scores", "train", **options), ScoreConfig(query_path=str(path / "queries")), PreprocessConfig()
        )
    return torch.from_numpy(load_scores(path / "scores")[:].copy())
