"""What recording adds to a training step: steps of a plain loop and of a recorded one in turns, medians.

python -m bench.recording.cost [CASE ...]    # rows go to bench/results/recording_cost.csv

Steps are timed once all proofs are made: the 4th, 16th, 64th, ... forward is proven again, for about two steps more.
"""

from __future__ import annotations

import argparse
import copy
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dropinf
from bench.endtoend import models
from bench.endtoend.models import Case
from bench.files import read_rows, write_rows

TABLE = Path("bench/results/recording_cost.csv")
FIELDS = ("case", "numbers", "plain_ms", "recorded_ms", "ratio", "rounds", "first_ms", "cpu")


def narrow() -> Case:
    """The GPT of bench.endtoend at half its width."""
    torch.manual_seed(0)
    ids = torch.randint(2048, (2, 128, 128))
    return Case("gpt128", models.GPT(2048, 128, 128, 4, 4), (ids[0], ids[1]), models.next_word, (), 16)


def lora() -> Case:
    """SmolLM2's shape with LoRA of rank 8 on all linears."""
    from peft import LoraConfig, get_peft_model

    case = models.smollm2()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(case.model, LoraConfig(r=8, target_modules=targets, lora_dropout=0.0))  # type: ignore[arg-type]
    return Case("smollm2-lora", model, case.batch, case.loss_fn, (), 4)


CASES: dict[str, tuple[Callable[[], Case], int, int]] = {  # case, numbers of each axis, rounds
    "gpt256": (models.gpt, 16, 9),
    "gpt128": (narrow, 16, 11),
    "resnet9": (models.resnet9, 16, 11),
    "smollm2": (models.smollm2, 8, 5),
    "smollm2-lora": (lora, 4, 5),
}


GROUP = 8  # columns side by side: a gather then reads few cache lines


class Loop:
    """A training loop, of which single steps are asked for."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.case, self.model = case, model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        self.run: Any = None

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        if self.run is not None:
            self.run.samples(range(self.case.samples))
        self.case.loss_fn(self.model, self.case.batch).mean().backward()
        self.optimizer.step()
        return time.perf_counter() - began


def measured(name: str) -> dict[str, str]:
    make, k, rounds = CASES[name]
    case = make()
    plain, recorded = Loop(case, case.model), Loop(case, copy.deepcopy(case.model))
    with tempfile.TemporaryDirectory() as folder:
        masks = {"lm_head*": 8, "*embed*": 8, "tokens": 8, "*": k}
        recording = dropinf.record(recorded.model, dropinf.Dropout(masks, group=GROUP), recorded.optimizer, out=folder)
        with recording as recorded.run:
            first = recorded.step()
            for _ in range(4):
                plain.step()
                recorded.step()
            times = [(plain.step(), recorded.step()) for _ in range(rounds)]
        numbers = sum(recording.columns.widths)
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
    ours, theirs = (statistics.median(t[i] for t in times) for i in (1, 0))
    ratio = statistics.median(b / a for a, b in times)
    values = (name, numbers, f"{1e3 * theirs:.1f}", f"{1e3 * ours:.1f}", f"{ratio:.3f}", rounds, f"{1e3 * first:.0f}")
    return dict(zip(FIELDS, (*map(str, values), processor()), strict=True))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    rows = read_rows(TABLE)
    for name in parser.parse_args().cases:
        row = measured(name)
        print(row, flush=True)
        rows = [r for r in rows if r["case"] != name] + [row]
        write_rows(TABLE, FIELDS, rows)


if __name__ == "__main__":
    main()
