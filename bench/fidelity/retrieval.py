"""Passages of the same document and genre by influence, and the cost: SmolLM2-135M on Brown. Needs `pip install gguf`.
Compressed gradients lie in out/fidelity/retrieval, rows in the table; both are kept on a re-run.

python -m bench.fidelity.retrieval
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import dropinf
from bench.files import read_rows, replacing, slug, write_rows
from dropinf import metrics

from . import data
from .baselines import bm25
from .evaluate import METHODS, RESULTS

OUT = Path("out/fidelity/retrieval")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# EACH passages of WORDS words, cut to TOKENS tokens, far apart in DOCUMENTS documents of GENRES genres; the middle one
# of every document is a query.
GENRES, DOCUMENTS, EACH, WORDS, TOKENS = 8, 5, 6, 80, 64
LAYERS = ["model.layers.*.mlp.*_proj", "model.layers.*.self_attn.*_proj"]
DIM, STEP, CALIBRATION = 16, 8, 48
SKETCHES = ("dropout", "dropout, runs of 8", "dropout, rotated", "dropout, rotated, whitened", "gaussian", "pca")
FIELDS = (
    "task", "method", "dim", "bytes_per_sample", "score", "same_document_top1", "same_document_p5", "same_genre_p5",
    "document_auc", "compress_ms", "baseline_ms", "calibrate_ms",
)  # fmt: skip
TASK = "smollm2-brown"
Row = dict[str, str]


@cache
def passages() -> tuple[list[str], Tensor, Tensor]:
    """The passages' texts, and the number of the document and of the genre of each."""
    words = data.brown_words()
    letters = sorted({name[1] for name in words})
    # Genres of at least DOCUMENTS texts, spread over the list; the first texts of each.
    by_genre = {c: sorted(name for name in words if name[1] == c) for c in letters}
    large = [c for c in letters if len(by_genre[c]) >= 4 * DOCUMENTS][:GENRES]
    texts: list[str] = []
    genres: list[int] = []
    for genre, letter in enumerate(large):
        for name in by_genre[letter][:: len(by_genre[letter]) // DOCUMENTS][:DOCUMENTS]:
            gap = len(words[name]) // EACH
            texts += [" ".join(words[name][i * gap : i * gap + WORDS]) for i in range(EACH)]
            genres += [genre] * EACH
    return texts, torch.arange(len(texts)) // EACH, torch.tensor(genres)


def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """Mean over positions."""
    (ids,) = batch
    logits = model(input_ids=ids).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


@cache
def model_and_ids() -> tuple[nn.Module, Tensor]:
    """The model in float32, and the tokens of every passage, [n, TOKENS]."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    ids = [tokenizer(text)["input_ids"][:TOKENS] for text in passages()[0]]
    return model.requires_grad_(False), torch.tensor(ids)


def queries() -> Tensor:
    """Which passages are queries."""
    return torch.arange(GENRES * DOCUMENTS * EACH) % EACH == EACH // 2


def quality(scores: Tensor) -> dict[str, float]:
    """How well scores [Q, N] find passages of the query's document; and, among the others, those of its genre."""
    _, document, genre = passages()
    asked = queries()
    same = document[asked][:, None] == document[~asked]
    related = genre[asked][:, None] == genre[~asked]
    top = scores.topk(5).indices
    elsewhere = scores.masked_fill(same, -torch.inf).topk(5).indices
    aucs = [metrics.mislabel_auc(row, mask) for row, mask in zip(scores, same, strict=True)]
    return {
        "same_document_top1": float(same.gather(1, top[:, :1]).double().mean()),
        "same_document_p5": float(same.gather(1, top).double().mean()),
        "same_genre_p5": float(related.gather(1, elsewhere).double().mean()),
        "document_auc": float(np.mean(aucs)),
    }


def batches(rows: Tensor) -> list[tuple[Tensor]]:
    return [(part,) for part in model_and_ids()[1][rows].split(STEP)]


def timed(work: Callable[[], object], samples: int) -> tuple[object, float]:
    """(the result, milliseconds a sample): of this process on a CPU, so that other load counts little."""
    start = time.process_time()
    result = work()
    return result, 1e3 * (time.process_time() - start) / samples


def bare(model: nn.Module, parts: list[tuple[Tensor]]) -> None:
    """Forward and input gradients alone."""
    for (ids,) in parts:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = model(inputs_embeds=embedded).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()


def compressed(name: str) -> tuple[dropinf.Gradients, dropinf.Gradients, dict[str, float]]:
    """(training gradients, those of the queries, times) of a sketch; from disk where they are."""
    paths = [OUT / f"{slug(name)}-{what}" for what in ("train", "query", "times.json")]
    if not paths[2].exists():
        OUT.mkdir(parents=True, exist_ok=True)  # for the gradients, which name their own temporary files
        model, _ = model_and_ids()
        asked = queries()
        train, query = batches(~asked), batches(asked)
        order = torch.randperm(int((~asked).sum()), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
        part = batches((~asked).nonzero().flatten()[order])
        compressor = dropinf.Compressor(model, METHODS[name].sketch(DIM), loss_fn, layers=LAYERS)
        _, calibrate = timed(lambda: compressor.calibrate(part), CALIBRATION)
        # The baseline beside every method, before and after, for the machine's speed changes.
        _, before = timed(lambda: bare(model, train[:2]), 2 * STEP)
        _, compress = timed(lambda: compressor.compress(train).save(paths[0]), int((~asked).sum()))
        _, after = timed(lambda: bare(model, train[:2]), 2 * STEP)
        compressor.compress(query).save(paths[1])
        times = {"compress_ms": compress, "baseline_ms": (before + after) / 2, "calibrate_ms": calibrate}
        with replacing(paths[2]) as temporary:
            temporary.write_text(json.dumps(times))
    return dropinf.Gradients.load(paths[0]), dropinf.Gradients.load(paths[1]), json.loads(paths[2].read_text())


def baselines() -> Iterator[tuple[str, Tensor]]:
    """Scores [Q, N] of the tokens, and of hidden states with the training passages' mean taken off."""
    model, ids = model_and_ids()
    asked = queries()
    rows = list(ids.numpy())
    train, query = ([row for row, q in zip(rows, asked, strict=True) if bool(q) == want] for want in (False, True))
    yield "BM25", bm25(train, query)
    with torch.no_grad():
        hidden = torch.cat([model.model(input_ids=part).last_hidden_state.mean(1) for part in ids.split(STEP)])
    hidden = nn.functional.normalize(hidden - hidden[~asked].mean(0))
    yield "mean hidden state", hidden[asked] @ hidden[~asked].T


def rows_of(name: str) -> Iterator[Row]:
    """The rows of one sketch."""
    train, query, times = compressed(name)
    about = {"task": TASK, "method": name, "dim": str(DIM), "bytes_per_sample": str(train.bytes_per_sample)}
    about |= {field: f"{value:.0f}" for field, value in times.items()}
    fisher = dropinf.build_fisher(train, "kronecker", "auto")
    for kind in ("cosine", "relative"):
        scores = dropinf.score(query, train, fisher if kind == "relative" else None, kind=kind)
        yield about | {"score": kind} | {field: f"{value:.3f}" for field, value in quality(scores).items()}


def main() -> None:
    torch.set_num_threads(1)
    path = RESULTS / "retrieval.csv"
    rows = read_rows(path)
    done = {row["method"] for row in rows}

    def add(new: list[Row]) -> None:
        rows.extend(new)
        write_rows(path, FIELDS, rows)
        for row in new:
            print(" | ".join(row.get(field, "") for field in FIELDS), flush=True)

    if not {"BM25", "mean hidden state"} <= done:
        for name, scores in baselines():
            numbers = {field: f"{value:.3f}" for field, value in quality(scores).items()}
            kind = "" if name == "BM25" else "cosine"
            add([{"task": TASK, "method": name, "score": kind} | numbers])
    for name in SKETCHES:
        if name not in done:
            add(list(rows_of(name)))


if __name__ == "__main__":
    main()
