"""The commands that read an index: queries and what else can be asked of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..compressor import Compressor
from ..directions import direction
from ..files import replacing
from ..fisher.fisher import Fisher, FisherKind, build_fisher
from ..gradients import Gradients
from ..index import verify as problems_of
from ..index.discard import has_more_passages
from ..index.export import check_beside
from ..index.folder import FISHER, PARTS, PASSAGES, SHARDS
from ..index.manifest import NAME, Manifest
from ..index.reader import MEMORY_BYTES, Index
from ..score import ScoreKind, TopK, score
from ..score import self_influence as self_influence_of
from ..text.passage_file import PassageFile
from ..text.passages import Passage, read_passages
from ..workload import Workload
from .console import Found, note, plain, print_json, print_table, size_text
from .page import save_query_page
from .recipe import Recipe, load_workload, parse_damping, pick_device
from .words import add_words

Option = typer.Option
IndexFolder = Annotated[Path, typer.Argument(help="Folder of the index.", metavar="INDEX")]
AsJson = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]
DampingOption = Annotated[str | None, Option(help="Another damping than the Fisher matrix was built with.")]


def query(
    index: IndexFolder,
    text: Annotated[list[str] | None, Option(help="A query; may be repeated.")] = None,
    label: Annotated[list[int] | None, Option(help="The class of each --text, for classifiers.")] = None,
    data: Annotated[str | None, Option(help="Queries from a file or dataset, as dropinf index reads them.")] = None,
    text_field: Annotated[str, Option(help="Where a query's text is in --data.")] = "text",
    id_field: Annotated[str | None, Option(help="Where its id is. (default: rows are numbered)")] = None,
    label_field: Annotated[str | None, Option(help="Where its class is, for classifiers.")] = None,
    loader: Annotated[
        str | None,
        Option(metavar="MODULE:FUNCTION", help="The model and batches of queries; see dropinf index --help."),
    ] = None,
    top: Annotated[int, Option(min=1, help="How many passages of either side.")] = 10,
    kind: Annotated[ScoreKind, Option(help="The score.")] = "influence",
    damping: DampingOption = None,
    opponents: Annotated[bool, Option(help="Show the passages of lowest score too.")] = True,
    words: Annotated[
        bool, Option("--tokens", help="Show what each word of the passages adds to their exact scores.")
    ] = False,
    as_json: AsJson = False,
    html: Annotated[Path | None, Option(help="Write a page with the result, too.")] = None,
    model: Annotated[str | None, Option(help="Where the index's model is now, if it was moved.")] = None,
    device: Annotated[str | None, Option(help="Where the model runs. (default: a GPU if there is one)")] = None,
) -> None:
    """Show the passages that lower a query's loss most when they are trained on, and those that raise it most."""
    if (text is not None) + (data is not None) + (loader is not None) != 1:
        raise typer.BadParameter("pass one of --text, --data and --loader")
    if label is not None and len(label) != len(text or ()):
        raise typer.BadParameter(
            f"{len(label)} for {len(text or ())} of --text; pass one for each", param_hint="--label"
        )
    train = open_index(index)
    if words:
        _check_words(train, kind, loader, shown=as_json or html is not None)
    if html is not None:
        check_beside(html, train.path)
    few_bits = train.manifest.codec.bits is not None
    if few_bits and damping is not None:
        raise ValueError(f"damping is {damping}; {index} has rows of few bits, whose damping is that of their code")
    reads = _reads_fisher(kind, damping) and not few_bits
    fisher = read_fisher(train, damping, "or ask for --kind dot or cosine") if reads else None
    recipe = Recipe.of(train.manifest.about)
    passages: list[Passage] | None = None
    if loader is not None:
        work = load_workload(loader)
    elif recipe is None or recipe.model is None:
        raise ValueError(f"{index} was not made from passages by dropinf index; pass its queries with --loader")
    else:
        if data is not None:
            passages = read_passages(data, text_field=text_field, id_field=id_field, label_field=label_field)
        else:
            passages = [Passage(str(i), t, label[i] if label else None) for i, t in enumerate(text or ())]
        text_model = replace(recipe, model=model or recipe.model).text_model(pick_device(device))
        replace(recipe, tokenizer=text_model.tokenizer_checksum()).check_tokenizer(recipe.tokenizer, index)
        work = text_model.workload(passages, tokens_per_batch=recipe.tokens_per_batch, loss=recipe.loss)
    compressor, ids, rows = _compressed(work, train)
    if passages is not None:  # batches are in the order of their lengths
        at = {name: i for i, name in enumerate(ids)}
        ids = [passage.id for passage in passages]
        rows = rows[[at[name] for name in ids]]
    best = [
        score(rows, train, fisher, kind=kind, top=top, largest=largest) for largest in (True, False)[: 1 + opponents]
    ]
    result: dict[str, Any] = {
        "index": str(index),
        "samples": len(train),
        "kind": kind,
        "fisher": _about(train, fisher),
        "queries": _answers(train, ids, None if passages is None else [p.text for p in passages], best),
    }
    if words:
        assert recipe is not None
        along = direction(rows, fisher if train.code is None else train.code.fisher, compressor)
        add_words(result["queries"], along, text_model, loss=recipe.loss, tokens_per_batch=recipe.tokens_per_batch)
    if html is not None:
        save_query_page(result, html)
        note(f"wrote {html}")
    if as_json:
        print_json(result)
    else:
        for asked in result["queries"]:
            _show_answer(asked, result)


def report(
    result: Annotated[Path, typer.Argument(help="What dropinf query --json printed; - for standard input.")],
    out: Annotated[Path, Option("--out", "-o", help="The page to write.")],
    title: Annotated[str, Option(help="Its title.")] = "Influence",
) -> None:
    """Make one HTML page of a query's result, which loads nothing else."""
    where = "standard input" if str(result) == "-" else str(result)
    data = sys.stdin.read() if str(result) == "-" else result.read_text(encoding="utf-8")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); pass what dropinf query --json printed") from None
    save_query_page(found, out, title)
    note(f"wrote {out}")


def self_influence(
    index: IndexFolder,
    top: Annotated[int, Option(min=1, help="How many samples to show.")] = 20,
    damping: DampingOption = None,
    as_json: AsJson = False,
    out: Annotated[Path | None, Option(help="Write the values of all samples to this .npy file, too.")] = None,
) -> None:
    """Show the samples that the others explain least: outliers and wrong labels."""
    if out is not None and out.suffix != ".npy":
        raise typer.BadParameter(f"{out} must end in .npy", param_hint="--out")
    train = open_index(index)
    fisher = read_fisher(train, damping)
    values = self_influence_of(train, fisher)
    if out is not None:
        with replacing(out) as temporary, open(temporary, "wb") as file:
            np.save(file, values.numpy())
        note(f"wrote {out}")
    most = values.sort(descending=True, stable=True)
    found = _samples(train, [TopK(most.values[None, :top], most.indices[None, :top])])[0][0]
    result = {"index": str(index), "samples": len(train), "fisher": about_fisher(fisher), "self_influence": found}
    if as_json:
        print_json({**result, "self_influence": [{k: v for k, v in s.items() if k != "image"} for s in found]})
    else:
        print_table(f"Self-influence; {_facts(result)}", [("", found)])


def fisher(
    index: IndexFolder,
    kind: Annotated[FisherKind, Option(help="Of its blocks.")] = "block",
    damping: Annotated[str, Option(help="auto, or a number such as 0.1.")] = "auto",
) -> None:
    """Build the Fisher matrix of an index, and keep it there in place of the one before."""
    value = parse_damping(damping)
    train = open_index(index)
    built = build_fisher(train, kind, value)
    train.save_fisher(built)
    note(f"{index}: Fisher matrix {about_fisher(built)}, {size_text((index / FISHER).stat().st_size)}")


def verify(index: IndexFolder) -> None:
    """Read every byte of an index; print "sound", or a line for each problem and exit with 1."""
    _check_there(index)
    problems = problems_of(index)
    print("\n".join(map(plain, problems)) or "sound")
    if problems:
        raise typer.Exit(1)


def compact(index: IndexFolder) -> None:
    """Merge small shards, as many appends leave them; rows, ids and their order stay."""
    found = open_index(index)
    before = found.info()["shards"]
    found.compact()
    note(f"{index}: {before:,} shards, now {found.info()['shards']:,}")


def info(index: IndexFolder, as_json: AsJson = False) -> None:
    """Show what an index holds and how it was made."""
    _check_there(index)
    manifest = Manifest.load(index)
    if not manifest.shards:
        _show_begun(index, manifest, as_json)
        return
    found = open_index(index).info()
    if as_json:
        print_json(found)
        return
    numbers = sum(int(np.prod(shape)) for shape in found["layers"].values())
    rows = {
        "index": found["path"],
        "samples": f"{found['samples']:,} x {numbers:,} numbers of {len(found['layers'])} layers, {found['dtype']}",
        "size": f"{size_text(found['bytes'])} in {found['shards']} shards",
        "a sample": size_text(found["bytes_per_sample"]),
        "finished": "yes" if found["finished"] else "no, an append was ended: run it again",
        "files": ", ".join(found["files"]),
        **{name.replace("_", " "): value for name, value in found["about"].items()},
    }
    for name, value in rows.items():
        print(plain(f"{name:<16} {value}"))


def _show_begun(index: Path, manifest: Manifest, as_json: bool) -> None:
    """Show what is known of an index whose first run was ended."""
    run, codec = manifest.runs[-1], manifest.codec
    parts = len(list((index / PARTS).glob("*-*"))) + run.shard_batches * len(list((index / SHARDS).glob("*-*")))
    done = parts if run.batches is None else min(parts, run.batches)
    found = {
        "path": str(index),
        "finished": False,
        "batches_done": done,
        "batches": run.batches,
        "bytes_per_sample": codec.row_bytes,
        "dtype": manifest.dtype,
        "layers": {layer.name: list(layer.shape) for layer in manifest.layers},
        "about": manifest.code,
    }
    if as_json:
        print_json(found)
        return
    of = "" if run.batches is None else f" of {run.batches:,}"
    rows = {
        "index": found["path"],
        "finished": f"no, {done:,}{of} batches are done: run the same command again, which goes on from there",
        "a sample": f"{codec.width:,} numbers of {len(manifest.layers)} layers, {size_text(codec.row_bytes)}",
        **{name.replace("_", " "): value for name, value in manifest.code.items()},
    }
    for name, value in rows.items():
        print(plain(f"{name:<16} {value}"))


def export(
    index: IndexFolder,
    out: Annotated[Path, typer.Argument(help="File that ends in .npy, .safetensors or .faiss.")],
    factory: Annotated[
        str | None, Option(metavar="TEXT", help="Of .faiss: which index, such as IVF4096,PQ64. (default: flat, exact)")
    ] = None,
    memory_bytes: Annotated[int, Option(min=1, help="Most memory that the rows may take.")] = MEMORY_BYTES,
) -> None:
    """Write rows whose inner products are influence scores, for any inner-product search, and their ids beside them."""
    train = open_index(index, memory_bytes)
    train.whitened(out, None if train.code else read_fisher(train, None), factory=factory)
    by = "index.code.queries(query)" if train.code else "index.fisher().whiten(query)"
    note(f"wrote {out}: {len(train):,} rows, and their ids to {out}.ids; multiply with {by}")


# What they share.


def _check_there(path: Path) -> None:
    if not (path / NAME).is_file():
        raise FileNotFoundError(
            f"{path}: no index (it has no {NAME}); make one with dropinf index --out {_quoted(path)}"
        )


def open_index(path: Path, memory_bytes: int = MEMORY_BYTES) -> Index:
    """Open an index; raise FileNotFoundError that names the command to make one where there is none."""
    _check_there(path)
    return Index.open(path, memory_bytes=memory_bytes)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _reads_fisher(kind: str, damping: str | None) -> bool:
    reads = kind in ("influence", "relative")
    if damping is not None and not reads:
        raise typer.BadParameter(f"--kind {kind} reads no Fisher matrix", param_hint="--damping")
    return reads


def read_fisher(index: Index, damping: str | None, otherwise: str = "") -> Fisher:
    """Return the Fisher matrix kept in an index, with another damping on request."""
    value = None if damping is None else parse_damping(damping)
    if index.manifest.codec.bits is not None:
        raise ValueError(f"{index.path}: rows of few bits have no self-influence; ask the index that they were made of")
    if FISHER not in index.manifest.files:
        more = f", {otherwise}" if otherwise else ""
        raise FileNotFoundError(
            f"{index.path}: no Fisher matrix in it; build one with: dropinf fisher {_quoted(index.path)}{more}"
        )
    kept = index.fisher()
    return kept if value is None else kept.with_damping(value)


def _about(train: Index, fisher: Fisher | None) -> str:
    """Return what scores were solved with."""
    if train.code is not None:
        return f"{about_fisher(train.code.fisher)}, in the code of its rows of {train.code.bits} bits"
    return "not used" if fisher is None else about_fisher(fisher)


def about_fisher(fisher: Fisher) -> str:
    """Return the kind and the damping of a Fisher matrix, as text."""
    return f"{fisher.kind}, damping {fisher.damping}"


def _check_words(train: Index, kind: ScoreKind, loader: str | None, *, shown: bool) -> None:
    """Raise BadParameter where the words of passages cannot be scored, or would not be shown."""
    recipe = Recipe.of(train.manifest.about)
    problems = {
        "it is in the page and in JSON: pass --html PAGE or --json": not shown,
        f"--kind {kind} is no product with a gradient: pass influence or dot": kind not in ("influence", "dot"),
        "it needs a model of text and its passages, and this index keeps neither": loader is not None
        or recipe is None
        or recipe.model is None
        or PASSAGES not in train.manifest.files,
    }
    for problem, there in problems.items():
        if there:
            raise typer.BadParameter(problem, param_hint="--tokens")


def _compressed(work: Workload, train: Index) -> tuple[Compressor, list[str], Gradients]:
    """Return the compressor of queries, by the sketch of the index, with their ids and compressed gradients."""
    compressor = Compressor.from_index(train, work.model, work.loss_fn, cu_seqlens=work.cu_seqlens)
    ids = [name for batch in work.batches for name in work.ids(batch)]
    rows = compressor.compress(work.batches)
    if len(ids) != len(rows):
        raise ValueError(f"loader: its ids are {len(ids)} and its losses {len(rows)}; they must be of the same samples")
    return compressor, ids, rows


def _answers(train: Index, ids: list[str], texts: list[str] | None, best: list[TopK]) -> list[Found]:
    sides = _samples(train, best)
    return [
        {
            "id": name,
            "text": None if texts is None else texts[i],
            "image": None,
            "proponents": sides[0][i],
            "opponents": sides[1][i] if len(sides) > 1 else [],
        }
        for i, name in enumerate(ids)
    ]


def _samples(train: Index, best: list[TopK]) -> list[list[list[Found]]]:
    """Return what is known of the samples of each TopK, by query and rank."""
    positions = sorted({i for side in best for i in side.indices.flatten().tolist()})
    names = dict(zip(positions, train.ids(positions), strict=True))
    texts = passage_texts(train, set(names.values()))
    return [
        [
            [
                {"position": i, "id": names[i], "score": value, "text": texts.get(names[i]), "image": None}
                for i, value in zip(indices, values, strict=True)
            ]
            for indices, values in zip(side.indices.tolist(), side.values.tolist(), strict=True)
        ]
        for side in best
    ]


def passage_texts(index: Index, wanted: set[str]) -> dict[str, str]:
    """Return the texts of these passages by id, none where the index has no passages, in one scan of the file."""
    expected = index.manifest.files.get(PASSAGES)
    if expected is None:
        return {}
    file = PassageFile(index.path / PASSAGES)
    if not has_more_passages(index.path, index.manifest):  # as where an append is beginning now
        file.check(expected)
    return file.texts(wanted)


def _facts(result: Mapping[str, Any]) -> str:
    return f"{result['samples']:,} samples in {result['index']}; Fisher matrix: {result['fisher']}"


def _show_answer(asked: Found, result: Mapping[str, Any]) -> None:
    text = "" if asked["text"] is None else f": {asked['text']}"
    sides = [(side.capitalize(), asked[side]) for side in ("proponents", "opponents") if asked[side]]
    print_table(f"Query {asked['id']}{text}", sides, f"{result['kind']}; {_facts(result)}")
