"""Causal language models and sequence classifiers of transformers: their losses, and batches of passages."""

from __future__ import annotations

import functools
import itertools
import json
import os
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import checksum
from ..workload import Workload
from .loading import AUTO, loading, task_of
from .passages import Passage, first_line, length_batches, need_package, packed_batches

Batch = dict[str, Any]
Task = Literal["auto", "causal-lm", "classifier"]
Reduction = Literal["mean", "sum"]

_IGNORED = -100  # label of a position that has no loss, as everywhere in transformers
_AT_ONCE = 1024  # texts that are tokenized together
_PROBE = 16  # tokens of a document that shows whether a model keeps packed documents apart
_ROUNDING = 2.0**-23  # of float32, in which many models compute norms and softmax whatever their dtype


class TextModel:
    """A causal language model or a sequence classifier with its tokenizer, in eval mode and frozen.

    Args:
        name: a folder, a model's name on the Hugging Face hub, or either with a GGUF file in it: `folder/file.gguf`.
        task: "auto" goes by the model's architecture.
        dtype: of the weights; what they are stored in where None.
        device: where the model and its batches are.
        max_tokens: where texts are cut; at the model's longest context where None.

    Raises:
        ValueError: transformers cannot load it, it is of another task, the weights of its head are not there, or
            `max_tokens` is beyond its context.
        ModuleNotFoundError: transformers, or gguf where needed, is not installed.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        *,
        task: Task = "auto",
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        max_tokens: int | None = None,
    ) -> None:
        transformers = need_package("transformers", "a model of text")
        self.name, self.device = os.fspath(name), torch.device(device)
        place, options = self.name, {}
        if self.name.endswith(".gguf"):
            need_package("gguf", "a GGUF file")
            place, options = os.path.dirname(self.name) or ".", {"gguf_file": os.path.basename(self.name)}
        with loading(self.name):
            config = transformers.AutoConfig.from_pretrained(place, **options)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        self.task = task_of(self.name, task, config.architectures or [], gguf=bool(options))
        # By default attention is sdpa, and eager where the model has none.
        with loading(self.name):
            self.model, found = getattr(transformers, AUTO[self.task]).from_pretrained(
                place, dtype=dtype or "auto", output_loading_info=True, **options
            )
        missing = sorted(set(found["missing_keys"]) & dict(self.model.named_parameters()).keys())
        if missing:
            raise ValueError(
                f"model {self.name}: its files have no {', '.join(missing[:3])}, so these would be random; "
                f"pass a model that was trained as a {self.task}, or another task="
            )
        self.model.config.use_cache = False
        self.model.eval().requires_grad_(False).to(self.device)
        self._vocabulary: int = self.model.get_input_embeddings().num_embeddings
        self.max_tokens = self._limit(max_tokens)
        self.pad = self._pad()

    def tokenizer_checksum(self) -> str:
        """Return a checksum of how texts become tokens; where they are cut counts for nothing."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            found: Any = self.tokenizer.get_vocab()
        else:
            found = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        flags = {k: v for k, v in self.tokenizer.init_kwargs.items() if isinstance(v, bool)}
        found = [type(self.tokenizer).__name__, self.tokenizer.truncation_side, flags, found]
        return checksum(json.dumps(found, sort_keys=True).encode())

    def workload(
        self,
        passages: Sequence[Passage],
        *,
        tokens_per_batch: int = 4096,
        packed: bool = False,
        loss: Reduction = "mean",
    ) -> Workload:
        """Tokenize the passages and plan their batches, which are padded when they are asked for, longest first.

        A batch is a dict of `ids` (a list), `input_ids` [N, T], `attention_mask` [N, T] and `labels`: [N, T], -100
        where padded, or [N] classes. Where packed: `ids`, `input_ids`, `position_ids` and `labels` [1, T], and
        `cu_seqlens` int64 [N + 1] on the CPU; the block-diagonal mask [1, 1, T, T] is made in the loss.

        Args:
            tokens_per_batch: most positions of a batch, padding included; one longer document is a batch of its own.
            packed: put documents of a causal language model in one row, without padding.
            loss: mean or sum over the next-token cross entropies of a document, in float32 or wider. A classifier has
                the cross entropy of its label either way.

        Raises:
            ValueError: no passages; a document without a next token; a label that is missing or that the model does not
                have; a model that cannot be packed.
        """
        if loss not in ("mean", "sum"):
            raise ValueError(f"loss is {loss!r}; it must be 'mean' or 'sum'")
        if packed and self.task != "causal-lm":
            raise ValueError(f"packed is True for a {self.task}; only a causal-lm can be packed: pass packed=False")
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch is {tokens_per_batch}; it must be at least 1")
        rows = self._rows(passages)
        if packed:
            self._check_packing(rows)
            groups = packed_batches(rows.lengths, tokens_per_batch)
            packed_loss = functools.partial(packed_losses, reduction=loss)
            batches = TextBatches(groups, rows.packed)
            return Workload(self.model, packed_loss, batches, itemgetter("ids"), itemgetter("cu_seqlens"))
        causal = self.task == "causal-lm"
        loss_fn = functools.partial(causal_losses, reduction=loss) if causal else class_losses
        # Without a padding id a classifier may read its last token from the padding: one sample a batch, then.
        most = tokens_per_batch if causal or self.pad is not None else 1
        batches = TextBatches(length_batches(rows.lengths, most), rows.padded)
        return Workload(self.model, loss_fn, batches, itemgetter("ids"))

    def token_losses(self, model: nn.Module, batch: Batch, *, loss: Reduction = "mean") -> Tensor:
        """Return what each token's own cross entropy adds to its document's loss, [N, T], of a batch of `workload`.

        Position t is of token t given those before it: 0 for the first and where a document has ended. They sum to the
        losses of the workload, of the same `loss`; `dropinf.tokens` takes it as its `loss_fn`.

        Raises:
            ValueError: the model is a classifier, whose loss is of no token.
        """
        self.check_has_tokens()
        return token_losses(model, batch, reduction=loss)

    def check_has_tokens(self) -> None:
        """Raise ValueError for a classifier, whose loss is of no token."""
        if self.task != "causal-lm":
            raise ValueError(f"model {self.name} is a {self.task}; its loss has no tokens: use dropinf.rerank")

    def places(self, text: str) -> list[tuple[int, int]]:
        """Return where each token of a text stands in it, (start, end) in characters; equal where it is of no text.

        Raises:
            ValueError: the tokenizer does not tell.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"model {self.name}: its {type(self.tokenizer).__name__} does not tell where tokens stand in a text; "
                "use a fast tokenizer, from a tokenizer.json"
            )
        cut = {"truncation": self.max_tokens is not None, "max_length": self.max_tokens}
        return list(map(tuple, self.tokenizer(text, return_offsets_mapping=True, **cut)["offset_mapping"]))

    def _limit(self, max_tokens: int | None) -> int | None:
        """Return where texts are cut; None where neither model nor tokenizer has a limit."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for name, module in self.model.named_modules():
            # RoBERTa's first positions are never used.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                context = module.num_embeddings - module.padding_idx - 1
        limits = [n for n in (context, self.tokenizer.model_max_length) if n is not None and 0 < n < 1 << 40]
        if max_tokens is None:
            return min(limits, default=None)
        least = 2 if self.task == "causal-lm" else 1
        if max_tokens < least or (context is not None and max_tokens > context):
            most = "" if context is None else f" and at most {context}, the context of {self.name}"
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least {least}{most}")
        return max_tokens

    def _pad(self) -> int | None:
        """Return the id that fills batches up, or None, and set it in the model's config.

        A classifier that reads the last token finds it by this id.
        """
        config = self.model.config.get_text_config()
        known = (config.pad_token_id, self.tokenizer.pad_token_id)
        config.pad_token_id = next((i for i in known if i is not None and 0 <= i < self._vocabulary), None)
        pad: int | None = config.pad_token_id
        return pad

    def _rows(self, passages: Sequence[Passage]) -> _Rows:
        if not passages:
            raise ValueError("passages is empty; it must have at least one passage")
        tokens, lengths, cut = array("i"), [], 0
        for start in range(0, len(passages), _AT_ONCE):
            texts = [passage.text for passage in passages[start : start + _AT_ONCE]]
            found = self.tokenizer(texts, truncation=self.max_tokens is not None, max_length=self.max_tokens)
            cut += sum(bool(encoding.overflowing) for encoding in found.encodings or ())
            for ids in found["input_ids"]:
                tokens.extend(ids)
                lengths.append(len(ids))
        if cut:
            warnings.warn(
                f"{cut} of {len(passages)} passages are longer than {self.max_tokens} tokens and were cut",
                stacklevel=3,
            )
        self._check_lengths(passages, lengths)
        flat = torch.frombuffer(tokens, dtype=torch.int32)
        if (highest := int(flat.max())) >= self._vocabulary:
            raise ValueError(
                f"model {self.name}: its tokenizer gave token {highest} and it has {self._vocabulary} embeddings; "
                "pass a folder where they belong together"
            )
        labels = self._labels(passages) if self.task == "classifier" else None
        edges = list(itertools.accumulate(lengths, initial=0))
        return _Rows([passage.id for passage in passages], flat, edges, labels, self.pad or 0, self.device)

    def _check_lengths(self, passages: Sequence[Passage], lengths: list[int]) -> None:
        least = 2 if self.task == "causal-lm" else 1
        for passage, length in zip(passages, lengths, strict=True):
            if length < least:
                why = "no next token to predict" if length else "nothing to read"
                raise ValueError(
                    f"passage {passage.id}: its number of tokens is {length}, so there is {why}; leave it out"
                )

    def _labels(self, passages: Sequence[Passage]) -> Tensor:
        classes = self.model.config.num_labels
        if classes < 2:
            raise ValueError(f"model {self.name}: num_labels is {classes}, a regression; a classifier has at least 2")
        for passage in passages:
            if passage.label is None or not 0 <= passage.label < classes:
                raise ValueError(
                    f"passage {passage.id}: label is {passage.label}; {self.name} needs one from 0 to {classes - 1}: "
                    "name their field with label_field=, or leave the passage out"
                )
        return torch.tensor([passage.label for passage in passages])

    def _check_packing(self, rows: _Rows) -> None:
        """Raise ValueError unless the model reads two copies of a document in one row as it reads one alone."""
        config = self.model.config.get_text_config()
        longest = max(rows.lengths)
        windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        window = min((n for n in windows if n), default=None)
        if window is not None and longest > window and getattr(config, "use_sliding_window", True):
            raise ValueError(
                f"packed is True and a document has {longest} tokens, but {self.name} attends to windows of "
                f"{window}, which are lost in packed rows; pass packed=False or max_tokens={window}"
            )
        ids = rows.tokens(rows.lengths.index(longest))[:_PROBE]
        twice = _Rows([""], ids, [0, len(ids)], None, 0, self.device).packed([0, 0])
        cause: Exception | None = None
        try:
            with torch.no_grad():
                alone, both = self.model(input_ids=ids[None].to(self.device)).logits, _packed_logits(self.model, twice)
            error = float((both.reshape(2, *alone.shape[1:]) - alone).abs().max() / alone.abs().max())
            if error <= max(torch.finfo(alone.dtype).eps, _ROUNDING) ** 0.5:
                return
            reason = f"its logits change by {error:.1g} of the largest"
        except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as refused:
            reason, cause = first_line(refused), refused
        raise ValueError(
            f"packed is True, but {self.name} does not keep packed documents apart ({reason}); pass packed=False"
        ) from cause


class TextBatches(Sequence[Any]):
    """Batches that are made when they are asked for; a slice is TextBatches too.

    `order` has compressed rows stand as the samples do, whatever batches these are in.
    """

    def __init__(self, groups: list[list[int]], build: Callable[[list[int]], Batch]) -> None:
        self.groups, self.build = groups, build

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def order(self) -> list[int]:
        """The number of each sample among all, in the order of the batches."""
        return [position for group in self.groups for position in group]

    def __getitem__(self, index: Any) -> Any:
        found = self.groups[index]
        return TextBatches(found, self.build) if isinstance(index, slice) else self.build(found)


@dataclass(frozen=True)
class _Rows:
    """Tokenized passages, in their order."""

    ids: list[str]
    flat: Tensor  # int32, all tokens
    edges: list[int]  # [n + 1], where each passage starts and ends
    labels: Tensor | None  # [n]
    pad: int
    device: torch.device

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in zip(self.edges, self.edges[1:], strict=False)]

    def tokens(self, position: int) -> Tensor:
        return self.flat[self.edges[position] : self.edges[position + 1]].long()

    def padded(self, group: list[int]) -> Batch:
        rows = [self.tokens(position) for position in group]
        fill = functools.partial(nn.utils.rnn.pad_sequence, rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = fill(padding_value=_IGNORED) if self.labels is None else self.labels[group]
        parts = {"input_ids": fill(padding_value=self.pad), "attention_mask": mask, "labels": labels}
        return {name: part.to(self.device) for name, part in parts.items()} | {"ids": [self.ids[i] for i in group]}

    def packed(self, group: list[int]) -> Batch:
        rows = [self.tokens(position) for position in group]
        ids = torch.cat(rows)
        cu = torch.tensor([0, *map(len, rows)]).cumsum(0)
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        # A document's first token is not predicted from the document before it.
        labels = ids.masked_fill(positions == 0, _IGNORED)
        parts = {"input_ids": ids, "position_ids": positions, "labels": labels}
        batch: Batch = {name: part[None].to(self.device) for name, part in parts.items()}
        return batch | {"cu_seqlens": cu, "ids": [self.ids[i] for i in group]}


# Losses: (model, batch) -> [N].


def causal_losses(model: nn.Module, batch: Batch, *, reduction: Reduction) -> Tensor:
    """Return the next-token cross entropy of each padded document, [N]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    counts = (batch["labels"][:, 1:] != _IGNORED).sum(1)
    losses = _next_token(logits, batch["labels"]).sum(1)
    return losses / counts if reduction == "mean" else losses


def packed_losses(model: nn.Module, batch: Batch, *, reduction: Reduction) -> Tensor:
    """Return the next-token cross entropy of each document of a packed row, [N]."""
    losses = F.pad(_next_token(_packed_logits(model, batch), batch["labels"])[0], (1, 0))
    documents = losses.split(batch["cu_seqlens"].diff().tolist())
    return torch.stack([d.sum() / (len(d) - 1) if reduction == "mean" else d.sum() for d in documents])


def token_losses(model: nn.Module, batch: Batch, *, reduction: Reduction) -> Tensor:
    """Return the parts of each document's loss by token, [N, T], padded or packed."""
    if "cu_seqlens" in batch:
        lengths = batch["cu_seqlens"].diff()
        found = F.pad(_next_token(_packed_logits(model, batch), batch["labels"])[0], (1, 0))
        rows, counts = nn.utils.rnn.pad_sequence(found.split(lengths.tolist()), batch_first=True), lengths - 1
    else:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows, counts = F.pad(_next_token(logits, batch["labels"]), (1, 0)), (batch["labels"][:, 1:] != _IGNORED).sum(1)
    return rows / counts[:, None].to(rows.device) if reduction == "mean" else rows


def class_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy of each label, [N]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(_wide(logits), batch["labels"], reduction="none")


def _next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss [N, T - 1] of each position on the next label, 0 where that is ignored."""
    losses = F.cross_entropy(
        _wide(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return losses.view(len(labels), -1)


def _packed_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits [1, T, V] of packed documents, which do not see each other."""
    ids, lengths = batch["input_ids"], batch["cu_seqlens"].diff()
    document = torch.arange(len(lengths)).repeat_interleave(lengths).to(ids.device)
    visible = (document[:, None] == document).tril()
    # Additive, as every kind of attention takes it: sdpa alone takes booleans.
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=ids.device).masked_fill_(~visible, torch.finfo(dtype).min)
    logits: Tensor = model(input_ids=ids, position_ids=batch["position_ids"], attention_mask=mask[None, None]).logits
    return logits


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
