"""What the rows of an index were made with: kept in its manifest, so that those of queries are made alike."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import typer

from ..text.passages import need_package
from ..text.transformer import Reduction, Task, TextModel
from ..workload import Workload

ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "bfloat16", "float16", "int8"]
_TEXT = (
    "model",
    "loader",
    "task",
    "model_dtype",
    "loss",
    "sampling",
    "dtype",
    "tokenizer",
)  # kept as they are, the rest as JSON
_CHOICES = {
    "task": get_args(Task),
    "model_dtype": get_args(ModelDtype),
    "loss": get_args(Reduction),
    "sampling": ("uniform", "energy"),
    "dtype": get_args(StoredDtype),
}
_FREE = ("model", "loader")  # may be elsewhere by now: weights and batches are compared themselves


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The model and how passages become tokens, batches and rows; with a loader, the model and all of that are its."""

    loader: str | None = None
    model: str | None = None
    task: Task = "auto"
    model_dtype: ModelDtype = "auto"
    max_tokens: int | None = None
    loss: Reduction = "mean"
    packed: bool = False
    tokens_per_batch: int = 4096
    layers: tuple[str, ...] | None = None
    dim: int | None = None
    budget_bytes: int | None = None
    sampling: Literal["uniform", "energy"] | None = None
    calibration: int | None = None
    seed: int = 0
    dtype: StoredDtype = "float32"
    tokenizer: str | None = None  # checksum; None in an index of an earlier version
    numbered: bool | None = None  # passages are named by their numbers; None in an index of an earlier version

    def about(self) -> dict[str, str]:
        """Return the recipe as the manifest keeps it."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value if name in _TEXT else json.dumps(value) for name, value in found.items()}

    @classmethod
    def of(cls, about: Mapping[str, str]) -> Recipe | None:
        """Return the recipe that a manifest keeps; None where the index was not made by the command line."""
        if not {"model", "loader"} & about.keys():
            return None
        known = {field.name for field in fields(cls)}
        found = {name: cls._read(name, text) for name, text in about.items() if name in known}
        return cls(**found)

    @staticmethod
    def _read(name: str, text: str) -> Any:
        """Return one entry of a manifest's `about`.

        Raises:
            ValueError: it is none that `about` writes.
        """
        try:
            value: Any = text if name in _TEXT else json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if name == "layers":
            value = tuple(value) if isinstance(value, list) else None
            fits = value is not None and all(isinstance(pattern, str) for pattern in value)
        elif name in _CHOICES:
            fits = value in _CHOICES[name]
        else:
            kind = str if name in _TEXT else bool if name in ("packed", "numbered") else int
            fits = type(value) is kind and not text.startswith("-")
        if not fits:
            raise ValueError(
                f"manifest: about has {name!r}: {text[:60]!r}, which dropinf index does not write; restore the manifest"
            )
        return value

    def check_same(self, before: Recipe, folder: object) -> None:
        """Raise ValueError where an index was begun with another recipe."""
        self.check_tokenizer(before.tokenizer, folder)
        if None not in (before.numbered, self.numbered) and before.numbered != self.numbered:
            named = "without --id-field, so that numbers are its ids" if before.numbered else "with --id-field"
            raise ValueError(
                f"{folder} was made {named}: name samples in the same way, or name another folder with --out"
            )
        for field in fields(self):
            old, new = getattr(before, field.name), getattr(self, field.name)
            if field.name not in (*_FREE, "tokenizer", "numbered") and old != new:
                raise ValueError(
                    f"{folder} was made with {_option(field.name, old)}, and this is {_option(field.name, new)}; "
                    "run the same command again, or name another folder with --out"
                )

    def check_tokenizer(self, before: str | None, folder: object) -> None:
        """Raise ValueError where texts became other tokens when an index was made."""
        if None not in (before, self.tokenizer) and before != self.tokenizer:
            raise ValueError(
                f"{folder} was made with another tokenizer of its model, so that the same text had other tokens; "
                "restore the tokenizer's files of then, or make a new index"
            )

    def text_model(self, device: torch.device) -> TextModel:
        """Load the model, without the progress bars of transformers."""
        assert self.model is not None
        logging = need_package("transformers", "a model of text").utils.logging
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        dtype = None if self.model_dtype == "auto" else getattr(torch, self.model_dtype)
        # The bar of GGUF files has no switch.
        silent = contextlib.redirect_stderr(io.StringIO()) if self.model.endswith(".gguf") else contextlib.nullcontext()
        with silent:
            return TextModel(self.model, task=self.task, dtype=dtype, device=device, max_tokens=self.max_tokens)


def _option(name: str, value: object) -> str:
    option = "--" + name.replace("_", "-")
    if value is None or value is False:
        return f"no {option}"
    values = value if isinstance(value, tuple) else (value,)
    return option if value is True else " ".join(f"{option} {one}" for one in values)


def load_workload(place: str) -> Workload:
    """Call `module:function`, of this folder or installed.

    Raises:
        ValueError: not of that form, no such function, or it returns something else.
        ModuleNotFoundError: no such module.
    """
    module, _, name = place.partition(":")
    if not module or not name:
        raise ValueError(f"loader: {place!r} must be module:function, such as my_model:load")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"loader: {module} has no function {name!r}")
    work = function()
    if not isinstance(work, Workload):
        raise ValueError(
            f"loader: {place} returned {type(work).__name__}; it must return a dropinf.transformer.Workload"
        )
    return work


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name, by default a GPU where there is one; each rank of torchrun has its own."""
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"device is {wanted!r}; it must be cpu, cuda or cuda:0, for instance") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {wanted!r}, and torch finds no GPU here; see dropinf doctor")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[dist.ProcessGroup | None]:
    """Connect the ranks that torchrun started, and yield their group; yield None where it started none."""
    if "WORLD_SIZE" not in os.environ:
        yield None
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield dist.group.WORLD
    dist.destroy_process_group()  # not after an error: the other ranks may never come


def parse_damping(text: str) -> float | Literal["auto"]:
    """Return the damping that the text names: "auto", or a finite number of at least 0.

    Raises:
        typer.BadParameter: the text is neither.
    """
    if text == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(f"{text!r} is neither auto nor a number of at least 0", param_hint="--damping")
    return value
