"""The README's training loop runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import dropinf

README = Path(__file__).parents[2] / "README.md"


def test_the_loop_of_the_readme(tmp_path, monkeypatch) -> None:
    section = README.read_text().partition("## While you train")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = [(torch.randn(8, 12), torch.randint(0, 5, (8,))) for _ in range(5)]
    names = {
        "torch": torch,
        "dropinf": dropinf,
        "model": nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 5)),
        "loss_fn": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        "loader": [([f"{i}.{j}" for j in range(8)], batch) for i, batch in enumerate(batches)],
        "query_batches": batches[:1],
    }
    exec(block, names)
    assert len(names["run"]) == 5
    assert names["scores"].shape == (8, 40)
    assert len(names["best"].ids) == 8
    added = [line for line in block.splitlines() if "record(" in line or "run.samples(" in line]
    assert len(added) == 2, "what a loop gets beside the indent of its with"
