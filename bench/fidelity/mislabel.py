"""Finding flipped labels: the last two layers of MiniLM, fine-tuned on SpamAssassin with a tenth of the labels wrong.

python -m bench.fidelity.mislabel
"""

from __future__ import annotations

import contextlib
import csv
import time
from collections import defaultdict

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

import dropinf
from dropinf import metrics

from . import data
from .evaluate import DAMPINGS, RESULTS
from .tasks import Batch, classification

N, TOKENS, TUNED, SEEDS = 400, 64, 2, 3
FRACTION = 0.1
EPOCHS, BATCH, RATE = 4, 20, 3e-4
SIZES = (8, 16)


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
    return BertModel.from_pretrained(data.minilm()).eval()


def hidden_states() -> tuple[Tensor, Tensor]:
    """What the layers below give for N mails of each half, [N, TOKENS, 384], and the labels."""
    texts, labels = data.spam_assassin()
    tokens = AutoTokenizer.from_pretrained(data.minilm())(texts, truncation=True, max_length=TOKENS)["input_ids"]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    chosen: list[int] = []
    for label in (0, 1):
        chosen += [i for i in order if labels[i] == label and len(tokens[i]) == TOKENS][: N // 2]
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


def sketches(k: int) -> dict[str, dropinf.Sketch]:
    return {
        "dropout": dropinf.Dropout(k),
        "dropout, runs of 8": dropinf.Dropout(k, group=8),
        "dropout, rotated": dropinf.Dropout(k, rank=4 * k),
        "dropout, rotated, whitened": dropinf.Dropout(k, rank=4 * k, whiten=True),
        "gaussian": dropinf.Gaussian(k),
        "pca": dropinf.PCA(k),
        "sjlt": dropinf.SJLT(k),
    }


def compressed(
    model: nn.Module, sketch: dropinf.Sketch, batches: list[Batch]
) -> tuple[dropinf.Gradients, float, float]:
    """(gradients, milliseconds a sample to compress, to calibrate)."""
    compressor = dropinf.Compressor(model, sketch, classification)
    start = time.perf_counter()
    compressor.calibrate(batches[:4])
    middle = time.perf_counter()
    train = compressor.compress(batches)
    done = time.perf_counter()
    return train, 1e3 * (done - middle) / N, 1e3 * (middle - start) / (4 * len(batches[0][0]))


def aucs(train: dropinf.Gradients, wrong: Tensor) -> dict[tuple[str, str], float]:
    found = {("dot", ""): metrics.mislabel_auc(train.flat.square().sum(1), wrong)}
    for kind in ("block", "kronecker"):
        fisher = dropinf.build_fisher(train, kind)
        for damping in DAMPINGS:
            with contextlib.suppress(ValueError):
                noisy = dropinf.self_influence(train, fisher.with_damping(damping))
                found[kind, str(damping)] = metrics.mislabel_auc(noisy, wrong)
    return found


def measured() -> list[list[object]]:
    x, y = hidden_states()
    values: dict[tuple[str, object, object, str, str], list[float]] = defaultdict(list)
    cost: dict[tuple[str, object], tuple[float, float]] = {}
    for seed in range(SEEDS):
        wrong = flipped(seed)
        model = tuned(x, torch.where(wrong, 1 - y, y), seed)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        given = torch.where(wrong, 1 - y, y)[order]
        batches = list(zip(x[order].split(25), given.split(25), strict=True))
        with torch.no_grad():
            losses = torch.cat([classification(model, b) for b in batches])
        values["loss, no gradient", "", "", "", ""].append(metrics.mislabel_auc(losses, wrong[order]))
        for k in SIZES:
            for name, sketch in sketches(k).items():
                train, *times = compressed(model, sketch, batches)
                cost[name, k] = tuple(times)
                for (kind, damping), value in aucs(train, wrong[order]).items():
                    values[name, k, train.bytes_per_sample, kind, damping].append(value)
            size = train.bytes_per_sample
            sketch = dropinf.choose(model, batches[:8], classification, budget_bytes=size).sketch
            train, *times = compressed(model, sketch, batches)
            cost["chosen", size] = tuple(times)
            for (kind, damping), value in aucs(train, wrong[order]).items():
                values["chosen", size, size, kind, damping].append(value)
        print(f"seed {seed} of {SEEDS} done", flush=True)
    return [
        [
            *key,
            f"{sum(v) / len(v):.4f}",
            f"{min(v):.4f}",
            f"{max(v):.4f}",
            *map(ms, cost.get(key[:2], ("", ""))),
            len(v),
        ]
        for key, v in values.items()
    ]


def ms(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def main() -> None:
    torch.set_num_threads(1)
    rows = measured()
    header = "method, dim, bytes_per_sample, kind, damping, auc, auc_low, auc_high, compress_ms, calibrate_ms, seeds"
    path = RESULTS / "minilm-spam.csv"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header.split(", "), *rows])
    temporary.replace(path)
    methods = dict.fromkeys((row[0], row[1]) for row in rows)
    for method in methods:
        own = [row for row in rows if tuple(row[:2]) == method]
        best = max(own, key=lambda row: float(str(row[5])))
        auto = max((row for row in own if row[4] == "auto"), key=lambda row: float(str(row[5])), default=best)
        print("|", " | ".join(map(str, [*best[:8], auto[5], *best[8:10]])), "|")


if __name__ == "__main__":
    main()
