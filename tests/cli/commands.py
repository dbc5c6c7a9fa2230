"""Commands run in this process, and the passages and models that the tests of commands share."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

import dropinf
from dropinf.cli import app
from dropinf.text.passages import Passage
from tests.text.models import WORDS

LOADER = """
import time
import torch
from dropinf.transformer import Workload

STALLS_AT = 1000  # the first batch that never comes


class Batches(list):
    def __getitem__(self, i):
        if i >= STALLS_AT:
            time.sleep(3600)
        return super().__getitem__(i)


def make(count, seed):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    g = torch.Generator().manual_seed(seed)
    batches = Batches((torch.randn(3, 6, generator=g).double(), torch.randint(3, (3,), generator=g)) for _ in range(count))
    return Workload(model, loss_fn, batches, ids)


def loss_fn(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def ids(batch):
    return [f"{float(x):.9f}" for x in batch[0][:, 0]]


def load():
    return make(12, 1)


def queries():
    return make(2, 9)


def number():
    return 7
"""


QUERIES = [" ".join(WORDS[:4]), " ".join(WORDS[2:13]), " ".join(WORDS[5:7])]


def run(*arguments, code: int = 0, stdin: str | None = None):
    """What a command does, in this process."""
    done = CliRunner().invoke(app.build_app(), [str(a) for a in arguments], input=stdin)
    assert done.exit_code == code, (done.output, done.exception)
    return done


def error_of(*arguments) -> str:
    """The one line of an error, without its prefix; nothing on standard output."""
    done = run(*arguments, code=1)
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("dropinf: ")]
    assert done.stderr.splitlines()[-1:] == lines[-1:], done.stderr
    return lines[-1].removeprefix("dropinf: ")


def query_json(*arguments):
    return json.loads(run("query", *arguments, "--json").stdout)


def make_passages(count: int, seed: int = 0, name: str = "p"):
    rng = np.random.default_rng(seed)
    return [
        Passage(f"{name}{i}", " ".join(rng.choice(WORDS, rng.integers(2, 12))), int(rng.integers(3)))
        for i in range(count)
    ]


def write_jsonl(path: Path, passages) -> Path:
    path.write_text("".join(json.dumps({"id": p.id, "text": p.text, "label": p.label}) + "\n" for p in passages))
    return path


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To rounding in float32."""
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@functools.cache
def fisher_of(rows, kind="block", damping="auto"):
    return dropinf.build_fisher(rows, kind, damping)


def query_rows(made):
    """The gradients of QUERIES, one by one."""
    _, _, compressor, model, _ = made
    parts = [compressor.compress(model.workload([Passage("", text)]).batches) for text in QUERIES]
    return dropinf.Gradients.cat(parts)


def shuffled(passages, count, seed):
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(seed))[:count]
    return [passages[i] for i in order.tolist()]


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **changes}
