"""Are the tokens that dropinf.tokens names those that matter? The small GPT is trained again without their loss.

For each query, the 1 % of training tokens with the highest shares lose their weight in the training loss. How much that
raises the query's loss is compared with as many random tokens, and with as many of the same words. What random masks of
10 to 50 % do is compared with what shares predict.

python -m bench.fidelity.token_masks               # resumes; a table of one line for each training
python -m bench.fidelity.token_masks --report      # the results, of what is there
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dropinf
from bench.files import read_rows, write_rows
from dropinf import metrics

from .evaluate import CALIBRATION, calibration
from .tasks import Batch, Task, task, word_losses

PATH = Path("bench/results/fidelity/token_masks.csv")
QUERIES = tuple(range(0, 100, 5))
BUDGET = 16384  # bytes of a float row
SHARE = 0.01  # of all training tokens, left out for one query
DRAWS = 4  # of as many random tokens
SHARES, EACH = (0.1, 0.3, 0.5), 12  # random masks shared by all queries
SEEDS = {"none": 4, "random": 4, "top": 4, "same words": 2, "subset": 2}  # trainings with each mask of a kind
FIELDS = ("mask", "number", "share", "seed", *map(str, QUERIES))
PREDICTED = "predicted"  # in the place of a seed: the sum of the shares that the mask takes away
Mask = tuple[str, int, float, Tensor]  # kind, number, share, and which tokens are left out, bool [N, T]


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """What each token adds to its sample's loss, which is their mean."""
    losses = word_losses(model, batch)
    return losses / losses.shape[1]


def masked(model: nn.Module, batch: Batch) -> Tensor:
    chunk, weights = batch
    return (token_losses(model, (chunk,)) * weights).sum(1)


def shares(found: Task) -> Tensor:
    """Each training token's share in each query's score, [Q, N, T], by the model of seed 0."""
    model = found.fit(torch.ones(len(found.train[0]), dtype=torch.bool), 0)
    part = calibration(found, CALIBRATION)
    choice = dropinf.choose(model, part, found.loss_fn, budget_bytes=BUDGET)
    compressor = dropinf.Compressor(model, choice.sketch, found.loss_fn)
    compressor.calibrate(part)
    train, query = (compressor.compress(found.batches(which)) for which in ("train", "query"))
    fisher = dropinf.build_fisher(train, "kronecker", "auto")
    direction = dropinf.direction(query[list(QUERIES)], fisher, compressor)
    return torch.cat([dropinf.tokens(model, direction, b, token_losses) for b in found.batches("train")], 1)


def masks(scores: Tensor, words: Tensor) -> Iterator[Mask]:
    """Yield the masks of tokens with these shares [Q, N, T], which predict these words [N, T]."""
    _, n, t = scores.shape
    yield "none", 0, 0.0, torch.zeros(n, t, dtype=torch.bool)
    for draw in range(DRAWS):
        yield "random", draw, SHARE, metrics.sample_subsets(n * t, 1, fraction=SHARE, seed=1000 + draw).view(n, t)
    for row, query in enumerate(QUERIES):
        best = torch.zeros(n * t, dtype=torch.bool)
        best[scores[row].flatten().topk(round(SHARE * n * t)).indices] = True
        yield "top", query, SHARE, best.view(n, t)
        yield "same words", query, SHARE, same_words(best, words.flatten(), query).view(n, t)
    for number in range(EACH):
        for share in SHARES:
            seed = 2000 + round(100 * share) * EACH + number
            yield "subset", number, share, metrics.sample_subsets(n * t, 1, fraction=share, seed=seed).view(n, t)


def same_words(mask: Tensor, words: Tensor, seed: int) -> Tensor:
    """Draw, of each word, as many of its tokens as a mask has, bool [tokens]."""
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros_like(mask)
    for word, count in zip(*words[mask].unique(return_counts=True), strict=True):
        drawn[order[words[order] == word][:count]] = True
    return drawn


def trained(found: Task, left_out: Tensor, seed: int) -> Tensor:
    """The queries' losses after training without the loss of some tokens, [Q]; the order of samples is as with them."""
    again = replace(found, train=(*found.train, (~left_out).float()), loss_fn=masked)
    model = again.fit(torch.ones(len(left_out), dtype=torch.bool), seed)
    return found.losses(model)[list(QUERIES)]


def run() -> None:
    found, rows = task("gpt-brown"), read_rows(PATH)
    scores = shares(found)
    done = {(r["mask"], int(r["number"]), float(r["share"]), r["seed"]) for r in rows}
    every = list(masks(scores, found.train[0][:, 1:]))
    for seed in (
        PREDICTED,
        *range(max(SEEDS.values())),
    ):  # whole rounds, so that what is there is balanced whenever it stops
        for kind, number, share, left_out in every:
            known = (kind, number, share, str(seed)) in done
            if known or (seed != PREDICTED and int(seed) >= SEEDS[kind]):
                continue
            values = scores[:, left_out].sum(1) if seed == PREDICTED else trained(found, left_out, int(seed))
            about: dict[str, Any] = {"mask": kind, "number": number, "share": share, "seed": seed}
            rows.append(about | {str(q): f"{float(v):.5f}" for q, v in zip(QUERIES, values, strict=True)})
            write_rows(PATH, FIELDS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true")
    torch.set_num_threads(1)
    if parser.parse_args().report:
        from .token_masks_report import report

        report()
    else:
        run()


if __name__ == "__main__":
    main()
