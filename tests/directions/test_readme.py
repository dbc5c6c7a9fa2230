"""The README's snippets of directions run as they stand, and their comments are true."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from tests.directions.cases import assert_near

README = Path(__file__).parents[2] / "README.md"


def test_the_tokens_of_the_readme():
    section = README.read_text().partition("## To the token")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    torch.manual_seed(0)
    inputs, labels = torch.randn(40, 3, 12, dtype=torch.float64), torch.randint(0, 5, (40, 3))
    batches = list(zip(inputs.split(8), labels.split(8), strict=True))
    names = {
        "torch": torch,
        "F": F,
        "dropinf": dropinf,
        "model": nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 5)).double(),
        "inputs": inputs,
        "labels": labels,
        "train_batches": batches,
        "query_batches": [(inputs[:2], labels[:2])],
    }
    exec(block, names)
    rows, exact, shares = names["rows"], names["exact"], names["shares"]
    scores = dropinf.score(names["query"], names["train"], names["fisher"])[:, rows]
    assert_near(exact, scores, 1e-9)
    assert shares.shape == (2, 8, 3)
    assert_near(shares.sum(2), scores[:, :8], 1e-9)
    difference = dropinf.rerank(names["model"], names["batches"], names["contrast"], names["loss_fn"])
    assert_near(difference, scores[:1] - scores[1:], 1e-9)


def test_the_whole_gradients_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README.read_text().partition("## Whole gradients")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    torch.manual_seed(0)
    inputs, labels = torch.randn(40, 3, 12, dtype=torch.float64), torch.randint(0, 5, (40, 3))
    batches = list(zip(inputs.split(8), labels.split(8), strict=True))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").sum(1)

    names = {
        "F": F,
        "dropinf": dropinf,
        "loss_fn": loss_fn,
        "model": nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 5)).double(),
        "train_batches": batches,
        "query_batches": [(inputs[:2], labels[:2])],
    }
    exec(block, names)
    assert names["exact"].shape == (2, 40)
    assert names["refined"].residuals.shape == (5, 2)
    assert bool((names["refined"].residuals[-1] < 0.5).all())
    assert (tmp_path / "refined.safetensors").exists()
