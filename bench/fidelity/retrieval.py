"""Passages of the same text and genre by influence, and the cost: SmolLM2-135M on Brown. Needs `pip install gguf`.

python -m bench.fidelity.retrieval
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import dropinf
from dropinf import metrics

from . import data
from .evaluate import RESULTS

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of every text, the last passage is a query; passages are of WORDS words, cut to TOKENS tokens.
TEXTS, EACH, WORDS, TOKENS = 30, 6, 80, 64
LAYERS = ["model.layers.*.mlp.*_proj", "model.layers.*.self_attn.*_proj"]
DIM, STEP = 16, 6
SKETCHES = {
    "dropout": dropinf.Dropout(DIM),
    "dropout, runs of 8": dropinf.Dropout(DIM, group=8),
    "dropout, rotated": dropinf.Dropout(DIM, rank=4 * DIM),
    "dropout, rotated, whitened": dropinf.Dropout(DIM, rank=4 * DIM, whiten=True),
    "gaussian": dropinf.Gaussian(DIM),
    "pca": dropinf.PCA(DIM),
}
FIELDS = (
    "method", "bytes_per_sample", "score", "same_text_top1", "same_text_auc", "same_genre_p5", "compress_ms",
    "calibrate_ms", "bare_ms",
)  # fmt: skip


def passages() -> tuple[list[str], Tensor]:
    """Texts of passages, and the number of the document each is of; TEXTS / 15 documents of each genre."""
    words = data.brown_words()
    first = sorted(words, key=lambda n: (n[2:], n))[:TEXTS]
    far = [len(words[name]) // EACH for name in first]  # passages of a document lie far apart
    texts = [
        " ".join(words[n][i * gap : i * gap + WORDS]) for n, gap in zip(first, far, strict=True) for i in range(EACH)
    ]
    return texts, torch.arange(TEXTS).repeat_interleave(EACH)


def genres() -> Tensor:
    names = sorted(data.brown_words(), key=lambda n: (n[2:], n))[:TEXTS]
    return torch.tensor([ord(name[1]) for name in names])


def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    (ids,) = batch
    logits = model(input_ids=ids).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def quality(scores: Tensor, owner: Tensor, is_query: Tensor) -> tuple[float, float, float]:
    """(the top passage is of the query's text, AUC of those that are, share of the genre among the top 5)."""
    same = owner[is_query][:, None] == owner[~is_query]
    kind = genres()[owner]
    related = kind[is_query][:, None] == kind[~is_query]
    top = scores.topk(5).indices
    auc = np.mean([metrics.mislabel_auc(row, mask) for row, mask in zip(scores, same, strict=True)])
    return (
        float(same.gather(1, top[:, :1]).double().mean()),
        float(auc),
        float(related.gather(1, top).double().mean()),
    )


def bare(model: nn.Module, batches: list[tuple[Tensor]]) -> float:
    """Milliseconds a passage of forward and input gradients alone."""
    start = time.perf_counter()
    for batch in batches:
        embedded = model.get_input_embeddings()(batch[0]).detach().requires_grad_(True)
        logits = model(inputs_embeds=embedded).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten()).backward()
    return 1e3 * (time.perf_counter() - start) / sum(len(b[0]) for b in batches)


def baselines(model: nn.Module, texts: list[str], ids: Tensor, is_query: Tensor) -> Iterator[tuple[str, Tensor]]:
    train, query = ([t for t, q in zip(texts, is_query, strict=True) if q == want] for want in (False, True))
    vectors = TfidfVectorizer(sublinear_tf=True).fit(train)
    yield "TF-IDF, no model", torch.from_numpy((vectors.transform(query) @ vectors.transform(train).T).toarray())
    with torch.no_grad():
        hidden = torch.cat([model.model(input_ids=part).last_hidden_state.mean(1) for part in ids.split(STEP)])
    hidden = nn.functional.normalize(hidden - hidden[~is_query].mean(0))
    yield "mean hidden state", hidden[is_query] @ hidden[~is_query].T


def main() -> None:
    torch.set_num_threads(1)
    folder = data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    model.requires_grad_(False)
    texts, owner = passages()
    ids = torch.tensor([tokenizer(text)["input_ids"][:TOKENS] for text in texts])
    is_query = torch.arange(len(texts)) % EACH == EACH - 1
    train, query = ([(part,) for part in ids[mask].split(STEP)] for mask in (~is_query, is_query))
    shuffled = ids[~is_query][torch.randperm(int((~is_query).sum()), generator=torch.Generator().manual_seed(0))]
    rows: list[list[object]] = []

    def add(method: str, size: object, kind: str, scores: Tensor, *times: float) -> None:
        numbers = [f"{v:.3f}" for v in quality(scores, owner, is_query)]
        rows.append([method, size, kind, *numbers, *(f"{t:.0f}" for t in times)])
        print("|", " | ".join(map(str, rows[-1])), "|", flush=True)

    for name, scores in baselines(model, texts, ids, is_query):
        add(name, "", "cosine", scores)
    floor = bare(model, train[:6])
    for name, sketch in SKETCHES.items():
        compressor = dropinf.Compressor(model, sketch, loss_fn, layers=LAYERS)
        start = time.perf_counter()
        compressor.calibrate([(part,) for part in shuffled.split(STEP)][:8])
        middle = time.perf_counter()
        found = compressor.compress(train)
        done = time.perf_counter()
        asked = compressor.compress(query)
        times = (1e3 * (done - middle) / len(found), 1e3 * (middle - start) / (8 * STEP), floor)
        fisher = dropinf.build_fisher(found, "kronecker", "auto")
        add(name, found.bytes_per_sample, "cosine", dropinf.score(asked, found, kind="cosine"), *times)
        add(name, found.bytes_per_sample, "relative", dropinf.score(asked, found, fisher, kind="relative"), *times)
    path = RESULTS / "smollm2-brown.csv"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])
    temporary.replace(path)


if __name__ == "__main__":
    main()
