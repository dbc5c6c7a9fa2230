"""What the fidelity benches compute beside the library, against the definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.fidelity import token_masks
from bench.fidelity.recall import recall
from bench.fidelity.tasks import GPT, Task, next_word
from bench.fidelity.token_masks_report import Trainings, effects, subsets


def small_task() -> Task:
    chunks = torch.randint(20, (12, 7), generator=torch.Generator().manual_seed(0))
    return Task("small", (chunks[:8],), (chunks[8:],), lambda: GPT(20, 6, 8, 1, 2), next_word, 2, 4, 1e-2)


def test_recall_counts_the_exact_best_among_the_best() -> None:
    scores, exact = (torch.randn(3, 200, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    for q, found in enumerate(recall(scores, exact, 50).tolist()):
        best = sorted(range(200), key=lambda n, q=q: -float(scores[q, n]))[:50]
        wanted = sorted(range(200), key=lambda n, q=q: -float(exact[q, n]))[:20]
        assert found == len(set(best) & set(wanted)) / 20


def test_a_training_without_masks_is_the_plain_one() -> None:
    found = small_task()
    again = replace(found, train=(*found.train, torch.ones(8, 6)), loss_fn=token_masks.masked)
    plain, masked = (x.fit(torch.ones(8, dtype=torch.bool), 3) for x in (found, again))
    for one, other in zip(plain.parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_mask_takes_the_gradients_of_its_tokens_away_and_no_others() -> None:
    found = small_task()
    model = found.fit(torch.ones(8, dtype=torch.bool), 0).double()
    (chunks,) = found.train
    weights = (torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) > 0.3).double()
    got = torch.autograd.grad(token_masks.masked(model, (chunks, weights)).sum(), list(model.parameters()))
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for n, t in weights.nonzero().tolist():
        word = -model(chunks[n : n + 1, :-1]).log_softmax(-1)[0, t, chunks[n, t + 1]] / 6
        for total, part in zip(wanted, torch.autograd.grad(word, list(model.parameters())), strict=True):
            total += part
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_same_words_are_as_many_of_each_word_and_no_other_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    words, mask = torch.randint(9, (400,), generator=generator), torch.rand(400, generator=generator) < 0.1
    drawn = [token_masks.same_words(mask, words, seed) for seed in range(2)]
    for one in drawn:
        assert words[one].sort().values.tolist() == words[mask].sort().values.tolist()
    assert not torch.equal(*drawn)


def table(loss: Any) -> list[dict[str, str]]:
    """Return the rows of a table whose losses are given as loss(mask, number, share, seed, query)."""
    queries = token_masks.QUERIES
    every = [("none", 0, 0.0), *(("random", draw, 0.01) for draw in range(2)), *(("top", q, 0.01) for q in queries)]
    every += [("same words", q, 0.01) for q in queries]
    every += [("subset", number, share) for number in range(4) for share in token_masks.SHARES]
    return [
        {"mask": kind, "number": str(number), "share": str(share), "seed": str(seed)}
        | {str(q): str(loss(kind, number, share, seed, q)) for q in queries}
        for seed in (token_masks.PREDICTED, 0, 1)
        for kind, number, share in every
    ]


def test_effects_are_taken_of_each_query_alone_and_against_the_same_seeds() -> None:
    def loss(kind: str, number: int, share: float, seed: Any, q: int) -> float:
        if seed == token_masks.PREDICTED:
            return 1000.0
        own = {"top": 0.5 + 0.01 * q, "same words": 0.25}.get(kind, 0.0) if number == q else 0.0
        return 3.0 + seed + own + (0.1 * (number + 1) if kind == "random" else 0.0)

    found = effects(Trainings(table(loss)), ["0", "1"])
    torch.testing.assert_close(found["top"], 0.5 + 0.01 * torch.tensor(token_masks.QUERIES, dtype=torch.float64))
    torch.testing.assert_close(found["same words"], torch.full((20,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(found["random"], torch.full((20,), 0.15, dtype=torch.float64))


def test_correlations_are_of_masks_of_one_share() -> None:
    def loss(kind: str, number: int, share: float, seed: Any, q: int) -> float:
        order: Tensor = torch.tensor([2, 0, 3, 1])
        within = float(order[number]) if kind == "subset" else 0.0
        # Predictions know the order in a share, and have the shares upside down.
        return within - 10 * share if seed == token_masks.PREDICTED else 5 + within + 10 * share

    lines = subsets(Trainings(table(loss))).splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines[:3]] == ["1.0000 [1.0000, 1.0000]"] * 3
    assert float(lines[3].split(" | ")[2].split()[0]) < 0 < float(lines[3].split(" | ")[3].split()[0])
