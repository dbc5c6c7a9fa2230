"""Scoring a long run: how long "adamw" and "tracin" take for 60 queries over a million recorded rows.

python -m bench.recording.scale [--rows 1000000] [--numbers 1000]    # writes 4 GB in the folder for temporary files
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

import dropinf
from dropinf.capture.masks import layer_digest
from dropinf.recording.run import ABOUT, FORMAT, SEGMENT, steps_name
from dropinf.recording.steps import Step, StepFile
from dropinf.sketch.axis import Axis

BATCH, QUERIES, EACH = 32, 60, 250  # samples of a step; queries; numbers of a layer


def write(folder: Path, rows: int, numbers: int) -> dict[str, str]:
    """Write a run of random rows, and return its layers' fingerprints."""
    widths = [EACH] * (numbers // EACH)
    layer = dropinf.Layer("0", "bias", "0", (EACH,), False, Axis.identity(EACH), None, "hook")
    digest = {str(i): layer_digest(layer) for i in range(len(widths))}
    about = {
        "format": FORMAT, "ranks": 1, "kind": "adam", "rows_alone": "", "optimizer": "AdamW", "begun": 0,
        "shapes": {name: [EACH] for name in digest}, "digest": digest, "sizes": [10 * EACH] * len(widths),
        "groups": [0] * len(widths), "is_mask": True,
    }  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(about))
    file, generator = StepFile(folder / steps_name(0)), torch.Generator().manual_seed(0)
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "decoupled": 1.0}
    state = [torch.zeros(numbers), torch.zeros(numbers)]
    for step in range(rows // BATCH):
        part = torch.randn(BATCH, numbers, generator=generator) / BATCH
        gradient = part.sum(0)
        at_start = [x.clone() for x in state] if step % SEGMENT == 0 else []
        ids = [str(step * BATCH + i) for i in range(BATCH)]
        file.append(
            Step(
                part,
                ids,
                gradient,
                1.0,
                [settings],
                [step + 1] * len(widths),
                share=torch.full((BATCH,), 1 / BATCH),
                state=at_start,
            )
        )
        state = [0.9 * state[0] + 0.1 * gradient, 0.999 * state[1] + 0.001 * gradient**2]
    return digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--numbers", type=int, default=1_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        digest = write(Path(name), arguments.rows, arguments.numbers)
        print(f"written in {time.perf_counter() - began:.0f} s", flush=True)
        run = dropinf.Run(name)
        rows = torch.randn(QUERIES, arguments.numbers, generator=torch.Generator().manual_seed(1))
        query = dropinf.Gradients(rows, dict.fromkeys(digest, (EACH,)), digest)
        for kind in ("tracin", "adamw"):
            began = time.perf_counter()
            found = dropinf.score(query, run, kind=kind, other_model=True)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(
                f"{kind}: {tuple(found.values.shape)} in {time.perf_counter() - began:.0f} s, {peak} MB at most",
                flush=True,
            )


if __name__ == "__main__":
    main()
