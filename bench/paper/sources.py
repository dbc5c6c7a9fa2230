"""Which of six sources a query's best training sample comes from: SmolLM2-135M, fine-tuned with LoRA.

A stand-in for the paper's sources of a language model's fine-tuning data. Needs `pip install gguf`.
"""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from bench.fidelity import data
from bench.fidelity.baselines import bm25
from bench.fidelity.retrieval import FILE
from bench.fidelity.tasks import Batch, Task, next_word

from . import rows
from .methods import NAMES, Scored, Setup, each, scored

EXPERIMENT = "sources"
SEEDS, TRAIN, QUERY, TOKENS = 2, 24, 6, 48  # samples of each source, and the tokens of one
WORDS = 64
TUNED = range(20, 30)  # the layers with adapters
SETUP = Setup(budget=20480, mean=False)
SETTING = f"six sources, {6 * QUERY} queries"
BM25 = "BM25"


def genre(letter: str) -> list[str]:
    """Return Brown's texts of a genre."""
    return [" ".join(words) for name, words in sorted(data.brown_words().items()) if name[1] == letter]


def mails(label: int) -> list[str]:
    """Return SpamAssassin's mails: ham 0, spam 1."""
    texts, labels = data.spam_assassin()
    return [text for text, own in zip(texts, labels, strict=True) if own == label]


def modules() -> list[str]:
    """Return the source of the standard library's modules, of this Python."""
    return [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]


SOURCES: dict[str, Callable[[], list[str]]] = {
    "news": lambda: genre("a"),
    "learned": lambda: genre("j"),
    "romance": lambda: genre("p"),
    "ham": lambda: mails(0),
    "spam": lambda: mails(1),
    "Python": modules,
}


@cache
def base() -> nn.Module:
    """Return the pre-trained model in float32."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(data.smollm2(), gguf_file=FILE, dtype=torch.float32)


@cache
def passages(seed: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of training and of query passages, [6 * TRAIN, TOKENS] and [6 * QUERY, TOKENS], by source.

    Each is from the middle of a text; no text has both.
    """
    tokenizer = AutoTokenizer.from_pretrained(data.smollm2(), gguf_file=FILE)
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[list[int]], list[list[int]]] = ([], [])
    for source in SOURCES.values():
        texts = source()
        order = torch.randperm(len(texts), generator=generator).tolist()
        found: list[list[int]] = []
        for at in order:
            words = texts[at].split(" ")
            begin = max(0, len(words) // 2 - WORDS)
            ids = tokenizer(" ".join(words[begin : begin + WORDS]))["input_ids"][:TOKENS]
            if len(ids) == TOKENS:
                found.append(ids)
        parts[1].extend(found[:QUERY])
        parts[0].extend((found[QUERY:] * 2)[:TRAIN])
    return torch.tensor(parts[0]), torch.tensor(parts[1])


class Logits(nn.Module):
    """A language model that returns its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def build() -> nn.Module:
    """Make the pre-trained model with new adapters of rank 8 on queries and values of the last layers."""
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], layers_to_transform=list(TUNED), lora_dropout=0.0)
    return Logits(get_peft_model(copy.deepcopy(base()), config))


class Few(Task):
    """A task in small batches: the first ones are audited, which costs as much as they hold."""

    def batches(self, which: str, size: int = 8) -> list[Batch]:
        """Return all "train" samples or all "query" samples."""
        return super().batches(which, size)


def task(seed: int) -> Task:
    """Return training passages of six sources, and as queries other passages of them."""
    train, query = passages(seed)
    return Few(EXPERIMENT, (train,), (query,), build, next_word, 2, 8, 2e-3, 0.0)


def quality(values: Tensor) -> dict[str, float]:
    """Return how often scores [Q, N], or [1, N], name a sample of the query's source: the best one, the best five."""
    of = [torch.arange(len(SOURCES)).repeat_interleave(count) for count in (QUERY, TRAIN)]
    top = values.expand(len(of[0]), -1).topk(5).indices
    right = of[1][top] == of[0][:, None]
    return {
        "source of the top 1": float(right[:, 0].double().mean()),
        "share of the top 5": float(right.double().mean()),
    }


def words(made: Task) -> Scored:
    """Return scores by words alone."""
    train, query = (list(part[0].numpy()) for part in (made.train, made.query))
    return Scored(bm25(train, query), 0.0)


def measures(found: Scored | None) -> dict[str, float]:
    """Return the quality of scores; of RelatIF's too where there are some."""
    if found is None:
        return {"refused": float("nan")}
    named = quality(found.values)
    if found.relative is not None:
        named |= {f"{name}, relative": value for name, value in quality(found.relative).items()}
    return named


def run(seed: int) -> None:
    """Write the rows of a seed that are missing."""
    todo = tuple(n for n in (BM25, *NAMES) if n not in rows.done(EXPERIMENT, SETTING, seed))
    if not todo:
        return
    made = task(seed)
    by_model = scored(made, seed, SETUP, EXPERIMENT)
    for method, found in each(lambda name: words(made) if name == BM25 else by_model(name), todo):
        rows.add(EXPERIMENT, SETTING, seed, method, measures(found), float("nan") if found is None else found.seconds)
