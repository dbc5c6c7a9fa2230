"""The words of passages with what each adds to the passage's exact score."""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections.abc import Sequence

from torch import Tensor

from ..directions import Direction, tokens
from ..text.passages import Passage
from ..text.transformer import Reduction, TextModel
from .console import Found

Words = list[tuple[str, float]]
_WORDS = re.compile(r"\S+\s*|\s+")  # a text is theirs in a row


def add_words(
    asked: Sequence[Found], direction: Direction, model: TextModel, *, loss: Reduction, tokens_per_batch: int
) -> None:
    """Put into each result of each query its exact score, ``exact``, and ``words``: [[text, share], ...].

    The texts of the words are the passage's in a row, the last one empty: it has the share of tokens that stand for no
    text. Shares sum to ``exact``, the product of the passage's whole gradient with the query's direction. A result
    without a text has neither.

    Raises:
        ValueError: the model is a classifier, its tokenizer does not tell where tokens stand in a text, or as
            `dropinf.tokens`.
    """
    model.check_has_tokens()
    loss_fn = functools.partial(model.token_losses, loss=loss)
    for i, query in enumerate(asked):
        results = [r for side in ("proponents", "opponents") for r in query[side] if r["text"] is not None]
        texts = sorted({result["text"] for result in results})
        if not texts:
            continue
        passages = [Passage(str(place), text) for place, text in enumerate(texts)]
        work = model.workload(passages, tokens_per_batch=tokens_per_batch, loss=loss)
        words: dict[str, Words] = {}
        for batch in work.batches:
            shares = tokens(work.model, direction[i], batch, loss_fn)[0]
            for place, row in zip(batch["ids"], shares, strict=True):
                text = texts[int(place)]
                words[text] = _words(text, model.places(text), row)
        for result in results:
            found = words[result["text"]]
            result |= {"exact": sum(share for _, share in found), "words": found}


def _words(text: str, places: Sequence[tuple[int, int]], shares: Tensor) -> Words:
    """Return the words of a text, each with the sum of its tokens' shares."""
    pieces = _WORDS.findall(text)
    starts = list(itertools.accumulate(map(len, pieces), initial=0))
    sums = [0.0] * (len(pieces) + 1)
    for (start, end), share in zip(places, shares.tolist(), strict=False):  # behind them is padding
        ink = next((at for at in range(start, end) if not text[at].isspace()), start)
        sums[len(pieces) if start == end else bisect.bisect_right(starts, ink) - 1] += share
    return list(zip([*pieces, ""], sums, strict=True))
