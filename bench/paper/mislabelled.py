"""Flipped labels found in a fine-tuned encoder: MiniLM's last layers, on mails and on the Brown corpus.

A stand-in for the paper's flipped labels in RoBERTa on GLUE.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.fidelity import data, mislabel
from bench.fidelity.mislabel import BATCH, EPOCHS, RATE, N, Tail, Texts, flipped, hidden_states, kept
from bench.fidelity.tasks import Task, classification
from dropinf import metrics

from . import rows
from .methods import BASELINES, NAMES, OUT, Scored, Setup, each, scored

EXPERIMENT = "mislabelled"
SEEDS, VALIDATION, WORDS = 3, 100, 80
SETUP = Setup(budget=3784, own=True)  # what a mask of 8 x 8 takes
OWN, ON_VALIDATION = "AUC, self-influence", "AUC, influence on validation"


def news_or_fiction() -> tuple[list[str], list[int]]:
    """Return passages of Brown's press reportage (0) and general fiction (1), genres a and k."""
    texts, labels = [], []
    for name, words in sorted(data.brown_words().items()):
        if name[1] in "ak":
            parts = [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS, WORDS)]
            texts += parts
            labels += [int(name[1] == "k")] * len(parts)
    return texts, labels


SOURCES: dict[str, Texts] = {"SpamAssassin": data.spam_assassin, "Brown, news or fiction": news_or_fiction}


def build() -> nn.Module:
    """Make the encoder's last layers, without their dropout, and a new output layer.

    The biases of attention keys stay as they are: their gradient is zero but for rounding.
    """
    model = Tail(mislabel.bert())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("key.bias"))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def task(source: str, seed: int) -> tuple[Task, Tensor]:
    """Return training texts of which a tenth has a flipped label, clean validation texts, and which are flipped."""
    texts = SOURCES[source]
    name = source.split(",")[0]
    states, labels = kept(OUT / EXPERIMENT / f"{name}.pt", lambda: hidden_states(source=texts))
    valid = kept(OUT / EXPERIMENT / f"{name}-valid.pt", lambda: hidden_states(VALIDATION, N, texts))
    wrong = flipped(seed)
    train = (states, torch.where(wrong, 1 - labels, labels))
    return Task(EXPERIMENT, train, valid, build, classification, EPOCHS, BATCH, RATE, 0.01), wrong


def measures(method: str, found: Scored | None, wrong: Tensor) -> dict[str, float]:
    """Return the AUC of the flipped labels: harmful is what raises the validation loss, or explains itself alone."""
    if found is None:
        return {"refused": float("nan")}
    harmful = metrics.mislabel_auc(-found.values[0], wrong)
    if method in BASELINES:
        return {OWN: harmful, ON_VALIDATION: harmful}
    assert found.own is not None
    return {OWN: metrics.mislabel_auc(found.own, wrong), ON_VALIDATION: harmful}


def run(seed: int) -> None:
    """Write the rows of a seed that are missing."""
    for source in SOURCES:
        todo = tuple(n for n in NAMES if n not in rows.done(EXPERIMENT, source, seed))
        if todo:
            made, wrong = task(source, seed)
            for method, found in each(scored(made, seed, SETUP, f"{EXPERIMENT}/{source.split(',')[0]}"), todo):
                seconds = float("nan") if found is None else found.seconds
                rows.add(EXPERIMENT, source, seed, method, measures(method, found, wrong), seconds)
