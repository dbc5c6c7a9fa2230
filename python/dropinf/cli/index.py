"""`dropinf index`: passages, or any model's batches, into an index; the same command again goes on with it."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer

from ..budget import choose
from ..capture.identity import check_weights
from ..compressor import Compressor
from ..files import TEMPORARY, file_checksum, is_whole
from ..fisher.fisher import Fisher, FisherKind
from ..index.choice import choose_run
from ..index.codec import DTYPES, Codec
from ..index.discard import discard as give_up
from ..index.discard import drop_unbegun, has_more_passages, settle_passages
from ..index.folder import PASSAGES, SKETCH, check_free, check_here, locked
from ..index.manifest import Manifest
from ..index.reader import Index
from ..index.runs import Plan
from ..index.writer import write_index
from ..ranks import Ranks
from ..sketch.sketch import Dropout
from ..text.passage_file import PassageFile, passage_line
from ..text.passages import Passage, read_passages
from ..text.transformer import Reduction, Task
from ..workload import Ids, Workload
from .console import Meter, is_first, note, size_text
from .recipe import ModelDtype, Recipe, StoredDtype, load_workload, parse_damping, pick_device, process_group

FisherChoice = Literal[FisherKind, "none"]
Option = typer.Option


@dataclass(frozen=True)
class Source:
    """What is compressed, the passages that it is of, and a part of it in random order, to calibrate on."""

    recipe: Recipe
    work: Workload
    passages: list[Passage] | None
    numbered: bool  # passages are called by their numbers
    part: Callable[[], Workload]


def index(
    out: Annotated[Path, Option("--out", "-o", help="Folder of the index.")],
    model: Annotated[
        str | None,
        Option(help="Folder, name on the Hugging Face hub, or folder/file.gguf of a causal LM or classifier."),
    ] = None,
    data: Annotated[
        str | None, Option(help="File .jsonl, .jsonl.gz or .parquet, or a Hugging Face dataset, as name or name:split.")
    ] = None,
    text_field: Annotated[str, Option(help="Where a passage's text is.")] = "text",
    id_field: Annotated[str | None, Option(help="Where its id is. (default: rows are numbered)")] = None,
    label_field: Annotated[str | None, Option(help="Where its class is, for classifiers.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Read the first so many passages alone.")] = None,
    task: Annotated[Task, Option(help="What the model is trained for.")] = "auto",
    model_dtype: Annotated[ModelDtype, Option(help="Of the weights; auto: as they are stored.")] = "auto",
    max_tokens: Annotated[
        int | None, Option(min=1, help="Where passages are cut (default: the model's context)")
    ] = None,
    loss: Annotated[Reduction, Option(help="Mean or sum over a passage's tokens.")] = "mean",
    layers: Annotated[
        list[str] | None, Option(help="Name pattern of layers to track; may be repeated (default: all)")
    ] = None,
    dim: Annotated[int | None, Option(min=1, help="Numbers stored per axis of a layer. (default: 64)")] = None,
    budget_bytes: Annotated[
        int | None,
        Option(min=1, help="Instead of --dim: choose sizes by layer, of so many bytes a passage in float32."),
    ] = None,
    sampling: Annotated[
        Literal["uniform", "energy"] | None, Option(help="How --dim picks coordinates. (default: uniform)")
    ] = None,
    calibration: Annotated[int, Option(min=1, help="Random passages that a budget or energy is judged by.")] = 300,
    seed: Annotated[int, Option(min=0, help="Of the sketch, and of which passages calibrate it.")] = 0,
    dtype: Annotated[StoredDtype, Option(help="Of the stored numbers.")] = "float32",
    fisher: Annotated[FisherChoice, Option(help="Fisher matrix to build in the same pass.")] = "block",
    damping: Annotated[str, Option(help="Of the Fisher matrix: auto, or a number such as 0.1.")] = "auto",
    tokens_per_batch: Annotated[int, Option(min=1, help="Most tokens of a batch, padding included.")] = 4096,
    packed: Annotated[bool, Option("--packed", help="Many passages in one row, without padding.")] = False,
    device: Annotated[str | None, Option(help="Where the model runs. (default: a GPU if there is one)")] = None,
    loader: Annotated[
        str | None, Option(metavar="MODULE:FUNCTION", help="Instead of --model and --data: any model; see above.")
    ] = None,
    append: Annotated[bool, Option("--append", help="Add these passages to a finished index.")] = False,
    discard: Annotated[
        bool, Option("--discard", help="Give up an append that was not finished; goes with --out alone.")
    ] = False,
) -> None:
    """Compress the gradient of every passage into an index; goes on where an earlier run was ended.

    Several processes share the work:

    torchrun --nproc-per-node 4 -m dropinf.cli index ...

    Any other model: --loader my_model:load, and in my_model.py of this folder:

    \b
        def load():  # loss_fn(model, batch) -> losses of N samples; ids(batch) -> their N names
            from dropinf.transformer import Workload
            return Workload(model, loss_fn, batches, ids)
    """
    if discard:
        if append or any(x is not None for x in (loader, model, data)):
            raise typer.BadParameter("it goes with --out alone", param_hint="--discard")
        _give_up(out)
        return
    if loader is None and (model is None or data is None):
        raise typer.BadParameter("pass --model and --data, or --loader")
    if loader is not None and (model is not None or data is not None):
        raise typer.BadParameter(
            "it brings its own model and data; leave --model and --data out", param_hint="--loader"
        )
    if budget_bytes is not None and (dim is not None or sampling is not None):
        raise typer.BadParameter(
            "it chooses dim and sampling; leave --dim and --sampling out", param_hint="--budget-bytes"
        )
    empty = None if fisher == "none" else Fisher(fisher, parse_damping(damping))
    if budget_bytes is None:
        dim, sampling = dim or 64, sampling or "uniform"
    calibrated = calibration if budget_bytes is not None or sampling == "energy" else None
    recipe = Recipe(
        loader=loader,
        model=model,
        task=task,
        model_dtype=model_dtype,
        max_tokens=max_tokens,
        loss=loss,
        packed=packed,
        tokens_per_batch=tokens_per_batch,
        layers=tuple(layers) if layers else None,
        dim=dim,
        budget_bytes=budget_bytes,
        sampling=sampling,
        calibration=calibrated,
        seed=seed,
        dtype=dtype,
    )
    place = pick_device(device)
    with process_group(place) as group:
        ranks = Ranks(group)
        ranks.first(lambda: _begun(out))
        if data is None:
            source = _loaded(recipe)
        else:
            passages = read_passages(
                data, text_field=text_field, id_field=id_field, label_field=label_field, limit=limit
            )
            source = _read(recipe, passages, id_field is None, place)
        _compress(source, out, ranks, empty, append)


def _give_up(out: Path) -> None:
    """Remove what was appended and not finished, and say what is left."""
    before = Manifest.load(out)
    something = before.unfinished or has_more_passages(out, before)
    with locked(out, Ranks(None)):
        left = give_up(out, Manifest.load(out))
    samples = sum(shard.rows for shard in left.shards)
    note(f"{out}: {'gave up what was appended last' if something else 'nothing to give up'}; {samples:,} samples")


def _begun(out: Path, *, drop: bool = False) -> Manifest | None:
    """Return the manifest of an index to go on with; None where the folder is free.

    ``drop``: give up a run of which nothing was stored, with its passages. The folder must be locked.
    """
    try:
        manifest = Manifest.load(out)
        return drop_unbegun(out, manifest) if drop else manifest
    except FileNotFoundError:
        if out.exists():
            check_free(out)
        return None


def _read(recipe: Recipe, passages: list[Passage], numbered: bool, device: torch.device) -> Source:
    model = recipe.text_model(device)
    assert recipe.model is not None
    name = os.path.abspath(recipe.model) if os.path.exists(recipe.model) else recipe.model
    recipe = replace(
        recipe,
        model=name,
        task=cast("Task", model.task),
        max_tokens=model.max_tokens,
        tokenizer=model.tokenizer_checksum(),
        numbered=numbered,
    )
    work = model.workload(passages, tokens_per_batch=recipe.tokens_per_batch, packed=recipe.packed, loss=recipe.loss)

    def part() -> Workload:
        chosen = [passages[i] for i in _shuffled(len(passages), recipe.seed)[: recipe.calibration]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was cut was said of all of them
            # Without padding, whose inputs would count in the statistics: packed, or one by one.
            if model.task == "causal-lm":
                with contextlib.suppress(ValueError):  # it cannot be packed
                    return model.workload(
                        chosen, tokens_per_batch=recipe.tokens_per_batch, packed=True, loss=recipe.loss
                    )
            return model.workload(chosen, tokens_per_batch=1, loss=recipe.loss)

    return Source(recipe, work, passages, numbered, part)


def _loaded(recipe: Recipe) -> Source:
    assert recipe.loader is not None
    work = load_workload(recipe.loader)

    def part() -> Workload:
        batches: list[Any] = []
        samples = 0
        for i in _shuffled(len(work.batches), recipe.seed):
            if samples < (recipe.calibration or 0):
                batches.append(work.batches[i])
                samples += len(work.ids(batches[-1]))
        return replace(work, batches=batches)

    return Source(recipe, work, None, False, part)


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _compress(source: Source, out: Path, ranks: Ranks, fisher: Fisher | None, append: bool) -> None:
    recipe, work = source.recipe, source.work
    progress = is_first() and sys.stderr.isatty()
    with locked(out, ranks):
        manifest = ranks.first(lambda: _begun(out, drop=True))
        if manifest is not None:
            before = Recipe.of(manifest.about)
            if before is not None:
                recipe.check_same(before, out)
            check_weights(work.model, manifest.model, out)
            known = manifest
            manifest = ranks.first(lambda: settle_passages(out, known))
        ids = _ids(source, ranks.first(lambda: _keep_passages(out, manifest, source, append)))
        if manifest is None:
            _draw(source, out / SKETCH, ranks, progress)
        elif not ranks.first(partial(is_whole, out / SKETCH, manifest.files.get(SKETCH))):
            _draw_again(source, out / SKETCH, manifest, ranks, progress)
        compressor = Compressor.from_masks(out / SKETCH, work.model, work.loss_fn, cu_seqlens=work.cu_seqlens)
    widths = tuple(math.prod(layer.stored_shape) for layer in compressor.layers.values())
    codec = Codec(recipe.dtype, tuple(compressor.layers), widths)
    if manifest is not None and manifest.codec.bits:
        codec, fisher = manifest.codec, None  # the rows have theirs in the code of the index
    note(f"{sum(widths):,} numbers of {len(widths)} layers, {size_text(codec.row_bytes)} a sample")
    meter = Meter()
    try:
        made = write_index(
            compressor,
            work.batches,
            out,
            dtype=DTYPES.get(codec.dtype),
            fisher=fisher,
            ids=ids,
            append=append,
            group=ranks.group,
            about=recipe.about(),
            progress=progress,
            wrote=meter,
        )
    except ValueError:
        if is_first() and manifest is not None:
            _take_passages_back(out)
        raise
    note(meter.summary(sum(ranks.everyone(meter.done))))
    if is_first():
        _say_where(made, out, recipe)


def _take_passages_back(out: Path) -> None:
    """Take out the passages of an append that was refused before it began."""
    with contextlib.suppress(OSError, ValueError), locked(out, Ranks(None), make=False):
        settle_passages(out, Manifest.load(out))


def _draw(source: Source, path: Path, ranks: Ranks, progress: bool) -> None:
    """Draw the sketch, and save that of rank 0 for all ranks to load, as rounding may differ between them."""
    recipe, work = source.recipe, source.work
    if recipe.calibration is not None:
        work = source.part()
        note(f"calibrating on {sum(len(work.ids(batch)) for batch in work.batches):,} samples in random order")
    if recipe.budget_bytes is None:
        assert recipe.dim is not None
        assert recipe.sampling is not None
        sketch = Dropout(recipe.dim, sampling=recipe.sampling, seed=recipe.seed)
    else:
        choice = choose(
            work.model,
            work.batches,
            work.loss_fn,
            budget_bytes=recipe.budget_bytes,
            layers=recipe.layers,
            cu_seqlens=work.cu_seqlens,
            seed=recipe.seed,
        )
        note(str(choice).splitlines()[-1])  # the rest is a line a layer
        sketch = choice.sketch
    compressor = Compressor(work.model, sketch, work.loss_fn, layers=recipe.layers, cu_seqlens=work.cu_seqlens)
    if recipe.calibration is not None:
        compressor.calibrate(work.batches, progress=progress)

    def save() -> None:
        check_here(path)
        compressor.save(path)

    ranks.first(save)


def _draw_again(source: Source, path: Path, manifest: Manifest, ranks: Ranks, progress: bool) -> None:
    """Draw the masks of an index anew, whose file is damaged or lost."""
    drawn = path.with_name(f".{path.name}{TEMPORARY}")
    _draw(source, drawn, ranks, progress)

    def settle() -> None:
        if file_checksum(drawn) != manifest.files[path.name]:
            drawn.unlink()
            raise ValueError(
                f"{path}: missing or damaged, and other masks are drawn from these data and options; run the command "
                "that made the index, or restore the file from a copy"
            )
        os.replace(drawn, path)

    ranks.first(settle)


def _ids(source: Source, start: int) -> Ids:
    """Return the function that names samples, of which the first is number `start` of the index."""
    ids = source.work.ids
    if not (source.numbered and start):
        return ids
    return lambda batch: [str(start + int(number)) for number in ids(batch)]


def _keep_passages(folder: Path, manifest: Manifest | None, source: Source, append: bool) -> int:
    """Write the passages beside the index, or check that they are those there; return the first one's number in it.

    Raises:
        ValueError: the file there holds others, or is damaged; an id that is there already.
    """
    file = PassageFile(folder / PASSAGES)
    if manifest is None:
        file.begin(_lines(source, 0))
        return 0
    batches = source.work.batches
    chosen = choose_run(folder, manifest, batches, batches[0], lambda start: _ids(source, start), append)
    if isinstance(chosen, Plan):
        start, count = chosen.first_sample, chosen.samples
    elif manifest.unfinished or not append:
        return 0  # the writer says what is wrong
    else:
        start, count = sum(run.rows for run in manifest.runs), None
    known = manifest.files.get(PASSAGES)
    if source.passages is None or known is None:
        if (source.passages is None) != (known is None):
            raise ValueError(f"{folder} was made {'with' if known is None else 'without'} --loader; do the same again")
        return start
    # Those of a run that is finished are as many as its samples; others stand at the end.
    stop = None if count is None else start + count
    changed = file.hold(_lines(source, start), start, stop, known)
    if changed is not None:
        manifest.with_file(PASSAGES, changed).save(folder)
    return start


def _lines(source: Source, start: int) -> list[bytes]:
    passages: Sequence[Passage] = source.passages or ()
    if source.numbered and start:
        passages = [replace(passage, id=str(start + i)) for i, passage in enumerate(passages)]
    return [passage_line(passage) for passage in passages]


def _say_where(made: Index, out: Path, recipe: Recipe) -> None:
    size = sum(path.stat().st_size for path in made.path.rglob("*") if path.is_file())
    asked = '--text "..."' if recipe.loader is None else f"--loader {recipe.loader}"
    note(f"{out}: {len(made):,} samples, {size_text(size)} on disk")
    note(f"next: dropinf query {shlex.quote(str(out))} {asked}")
