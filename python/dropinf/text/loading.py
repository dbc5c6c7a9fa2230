"""What a model of transformers is, and what to say where it cannot be loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from .passages import first_line

AUTO = {"causal-lm": "AutoModelForCausalLM", "classifier": "AutoModelForSequenceClassification"}
_HEADS = {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForSequenceClassification": "classifier"}


def task_of(name: str, task: str, architectures: Sequence[str], *, gguf: bool) -> str:
    """Return the task of a model, "causal-lm" or "classifier": the one that is asked for, or its architecture's.

    Raises ValueError where it is neither.
    """
    if task in AUTO:
        return task
    if task != "auto":
        raise ValueError(f"task is {task!r}; it must be 'auto', 'causal-lm' or 'classifier'")
    if gguf:
        return "causal-lm"
    for architecture in architectures:
        for head, kind in _HEADS.items():
            if architecture.endswith(head):
                return kind
    raise ValueError(
        f"model {name}: its architecture is {', '.join(architectures) or 'not given'}, neither ...ForCausalLM nor "
        "...ForSequenceClassification; pass another model, or task='causal-lm' or 'classifier'"
    )


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Raise ValueError, with the model's name, where transformers cannot load what is loaded inside."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {name}: transformers cannot load it ({first_line(error)}); pass a folder with configuration, "
            "weights and tokenizer, a name on the hub, or folder/file.gguf"
        ) from error
