"""Finding flipped labels: the last two layers of MiniLM, fine-tuned on SpamAssassin with a tenth of the labels wrong.

python -m bench.fidelity.mislabel    # resumes: models and the AUCs of each seed are kept in out/fidelity/mislabel
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

import dropinf
from bench.files import read_rows, replacing, slug, write_rows
from dropinf import metrics

from . import data
from .evaluate import METHODS as ALL
from .evaluate import RESULTS, stored
from .tasks import Batch, classification

OUT = Path("out/fidelity/mislabel")
TABLE = RESULTS / "mislabel.csv"
FIELDS = (
    "task", "method", "dim", "bytes_per_sample", "kind", "damping", "auc", "auc_low", "auc_high",
    "compress_ms_per_sample", "calibrate_ms_per_sample", "seeds",
)  # fmt: skip
TASK = "minilm-spam"
N, TOKENS, TUNED, SEEDS = 400, 64, 2, 3
FRACTION = 0.1
EPOCHS, BATCH, RATE = 4, 20, 3e-4
CALIBRATION = 200
KINDS = ("block", "kronecker")
DAMPINGS: tuple[float | str, ...] = (*(10.0**e for e in range(-5, 2)), "auto")
# Neither has a size: the loss alone, and the norms of the whole gradients.
LOSS, NORM = "loss, no gradient", "uncompressed"
METHODS = (
    "dropout", "dropout, runs of 8", "dropout, energy", "dropout, flat", "dropout, rotated",
    "dropout, rotated, whitened", "gaussian", "pca", "sjlt",
)  # fmt: skip
CHOSEN = "chosen"  # by dropinf.choose, at the bytes of dropout


class Tail(nn.Module):
    """The encoder's last layers, the mean over positions, and an output layer; on hidden states."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.layers = nn.ModuleList(bert.encoder.layer[-TUNED:])
        self.head = nn.Linear(bert.config.hidden_size, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.mean(1))


def bert() -> BertModel:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return BertModel.from_pretrained(data.minilm()).eval()


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` returned when the file was written."""
    if not path.exists():
        with replacing(path) as temporary:
            torch.save(make(), temporary)
    return torch.load(path)


Texts = Callable[[], tuple[list[str], list[int]]]  # and the label of each, 0 or 1


def hidden_states(count: int = N, skip: int = 0, source: Texts = data.spam_assassin) -> tuple[Tensor, Tensor]:
    """What the layers below give for texts, [count, TOKENS, 384], half of them of label 1, and the labels."""
    texts, labels = source()
    tokens = AutoTokenizer.from_pretrained(data.minilm())(texts, truncation=True, max_length=TOKENS)["input_ids"]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    chosen: list[int] = []
    for label in (0, 1):
        full = [i for i in order if labels[i] == label and len(tokens[i]) == TOKENS]
        chosen += full[skip // 2 : (skip + count) // 2]
    ids = torch.tensor([tokens[i] for i in chosen])
    model = bert()
    with torch.no_grad():
        parts = [model(part, output_hidden_states=True).hidden_states[-1 - TUNED] for part in ids.split(50)]
    return torch.cat(parts), torch.tensor([labels[i] for i in chosen])


def flipped(seed: int) -> Tensor:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(N, dtype=torch.bool).scatter_(0, order[: int(FRACTION * N)], True)


def tuned(x: Tensor, y: Tensor, seed: int) -> Tail:
    torch.manual_seed(seed)
    model = Tail(bert()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    for _ in range(EPOCHS):
        for rows in torch.randperm(N).split(BATCH):
            optimizer.zero_grad()
            classification(model, (x[rows], y[rows])).mean().backward()
            optimizer.step()
    return model.eval()


@cache
def run(seed: int) -> tuple[Tail, list[Batch], Tensor]:
    """(the model, its training mails in random order, which of them are flipped)."""
    x, y = kept(OUT / "hidden.pt", hidden_states)
    wrong = flipped(seed)
    given = torch.where(wrong, 1 - y, y)
    model = Tail(bert())
    model.load_state_dict(kept(OUT / f"model-{seed}.pt", lambda: tuned(x, given, seed).state_dict()))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return model.eval(), list(zip(x[order].split(25), given[order].split(25), strict=True)), wrong[order]


def quality(seed: int) -> str:
    """How well the model does on mails that it has not seen, and how many of its given labels it reproduces."""
    model, batches, wrong = run(seed)
    x, y = kept(OUT / "unseen.pt", lambda: hidden_states(200, N))
    with torch.no_grad():
        unseen = float((model(x).argmax(1) == y).double().mean())
        fits = torch.cat([model(a).argmax(1) == b for a, b in batches]).double()
    clean, noisy = float(fits[~wrong].mean()), float(fits[wrong].mean())
    return f"seed {seed}: unseen mails {unseen:.3f}; given label reproduced: clean {clean:.3f}, flipped {noisy:.3f}"


def losses(seed: int) -> dict[str, Any]:
    model, batches, wrong = run(seed)
    with torch.no_grad():
        found = torch.cat([classification(model, b) for b in batches])
    return {"auc": {"|": metrics.mislabel_auc(found, wrong)}}


def norms(seed: int) -> dict[str, Any]:
    """By the norm of the whole gradient, a batch at a time."""
    model, batches, wrong = run(seed)
    compressor = dropinf.Compressor(model, dropinf.Identity(), classification)
    start = time.perf_counter()
    squares, size = [], 0
    for batch in batches:
        gradients = compressor.compress([batch])
        squares.append(gradients.flat.square().sum(1))
        size = gradients.bytes_per_sample
    seconds = time.perf_counter() - start
    auc = {"dot|": metrics.mislabel_auc(torch.cat(squares), wrong)}
    return {"auc": auc, "bytes": size, "compress": 1e3 * seconds / N}


def sketched(name: str, dim: int, seed: int) -> dict[str, Any]:
    model, batches, wrong = run(seed)
    few = batches[: CALIBRATION // len(batches[0][0])]
    start = time.perf_counter()
    if name == CHOSEN:
        size = stored(model, dropinf.Dropout(dim), classification)
        sketch: dropinf.Sketch = dropinf.choose(model, few, classification, budget_bytes=size).sketch
    else:
        sketch = ALL[name].sketch(dim)
    compressor = dropinf.Compressor(model, sketch, classification)
    compressor.calibrate(few)
    middle = time.perf_counter()
    train = compressor.compress(batches)
    done = time.perf_counter()
    return {
        "auc": aucs(train, wrong),
        "bytes": train.bytes_per_sample,
        "compress": 1e3 * (done - middle) / N,
        "calibrate": 1e3 * (middle - start) / CALIBRATION,
    }


def aucs(train: dropinf.Gradients, wrong: Tensor) -> dict[str, float]:
    """ "kind|damping" -> AUC."""
    found = {"dot|": metrics.mislabel_auc(train.flat.square().sum(1), wrong)}
    for kind in KINDS:
        fisher = dropinf.build_fisher(train, kind)
        for damping in DAMPINGS:
            with contextlib.suppress(ValueError):
                noisy = dropinf.self_influence(train, fisher.with_damping(damping))
                found[f"{kind}|{damping}"] = metrics.mislabel_auc(noisy, wrong)
    return found


def measured(name: str, dim: int, seed: int) -> dict[str, Any]:
    """One method, size and seed, from the file where it is known."""
    path = OUT / f"{slug(name)}-{dim}-{seed}.json"
    if not path.exists():
        found = losses(seed) if name == LOSS else norms(seed) if name == NORM else sketched(name, dim, seed)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(found))
    return json.loads(path.read_text())


def rows_of(name: str, dim: int) -> list[dict[str, object]]:
    """All settings of one method and size, over seeds; times are the least of the seeds."""
    parts = [measured(name, dim, seed) for seed in range(SEEDS)]
    times = (f"{min(p[c] for p in parts):.2f}" if c in parts[0] else "" for c in ("compress", "calibrate"))
    cost = dict(zip(FIELDS[-3:-1], times, strict=True))
    rows = []
    for setting in parts[0]["auc"]:
        values = [p["auc"][setting] for p in parts if setting in p["auc"]]
        kind, damping = setting.split("|")
        about = dict(zip(FIELDS, (TASK, name, dim or "", parts[0].get("bytes", ""), kind, damping), strict=False))
        spread = {"auc": sum(values) / len(values), "auc_low": min(values), "auc_high": max(values)}
        rows.append(about | {k: f"{v:.4f}" for k, v in spread.items()} | cost | {"seeds": len(values)})
    return rows


def shown(rows: list[dict[str, object]]) -> str:
    """A line of the table: per kind of Fisher matrix the best of the sweep, and "auto"."""
    first = rows[0]
    cells = [str(first[field]) for field in ("method", "dim", "bytes_per_sample")]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        # A setting that is singular for some seeds would be judged by the others alone.
        whole = [r for r in own if r["damping"] != "auto" and int(str(r["seeds"])) == SEEDS]
        best = max(whole, key=lambda r: float(str(r["auc"])))
        auto = [f", auto {float(str(r['auc'])):.3f}" for r in own if r["damping"] == "auto"]
        at = f" at {float(str(best['damping'])):g}" if best["damping"] else ""
        spread = f"[{float(str(best['auc_low'])):.3f}, {float(str(best['auc_high'])):.3f}]"
        cells.append(f"{kind} {float(str(best['auc'])):.3f} {spread}{at}{''.join(auto)}")
    cells += [str(first[field]) for field in FIELDS[-3:-1]]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    everything = [LOSS, NORM, *METHODS, CHOSEN]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=everything, default=everything)
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 16])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows(TABLE)
    done = {(row["method"], str(row["dim"])) for row in rows}
    plain = [(name, 0) for name in (LOSS, NORM) if name in arguments.methods]
    sized = [(name, dim) for dim in arguments.dims for name in arguments.methods if name not in (LOSS, NORM)]
    if any((name, str(dim or "")) not in done for name, dim in plain + sized):
        print("\n".join(quality(seed) for seed in range(SEEDS)), flush=True)
    for name, dim in plain + sized:
        if (name, str(dim or "")) not in done:
            rows += rows_of(name, dim)
            write_rows(TABLE, FIELDS, rows)
        print(shown([r for r in rows if (r["method"], str(r["dim"])) == (name, str(dim or ""))]), flush=True)


if __name__ == "__main__":
    main()
