"""The `dropinf` command: what it prints and keeps is what the Python API gives, and whatever is wrong is one line."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dropinf
from dropinf import cli, doctor
from dropinf.index import verify
from dropinf.passages import Passage, read_passages
from dropinf.transformer import TextBatches, TextModel
from test_index import files
from test_transformer import WORDS, folders  # noqa: F401  a fixture

pytest.importorskip("typer")
testing = pytest.importorskip("typer.testing")

LOADER = """
import time
import torch
from dropinf.transformer import Workload

DELAY = 0.0


class Batches(list):
    def __getitem__(self, i):
        time.sleep(DELAY)
        return super().__getitem__(i)


def make(count, seed):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    g = torch.Generator().manual_seed(seed)
    batches = Batches((torch.randn(3, 6, generator=g).double(), torch.randint(3, (3,), generator=g)) for _ in range(count))
    return Workload(model, loss_fn, batches, ids)


def loss_fn(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def ids(batch):
    return [f"{float(x):.9f}" for x in batch[0][:, 0]]


def load():
    return make(12, 1)


def queries():
    return make(2, 9)


def number():
    return 7
"""


def run(*arguments, code: int = 0, stdin: str | None = None):
    """What a command does, in this process."""
    done = testing.CliRunner().invoke(cli.build_app(), [str(a) for a in arguments], input=stdin)
    assert done.exit_code == code, (done.output, done.exception)
    return done


def error_of(*arguments) -> str:
    """The one line of an error, without its prefix; nothing on standard output."""
    done = run(*arguments, code=1)
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("dropinf: ")]
    assert done.stderr.splitlines()[-1:] == lines[-1:], done.stderr
    return lines[-1].removeprefix("dropinf: ")


def query_json(*arguments):
    return json.loads(run("query", *arguments, "--json").stdout)


def make_passages(count: int, seed: int = 0, name: str = "p"):
    rng = np.random.default_rng(seed)
    return [
        Passage(f"{name}{i}", " ".join(rng.choice(WORDS, rng.integers(2, 12))), int(rng.integers(3)))
        for i in range(count)
    ]


def write_jsonl(path: Path, passages) -> Path:
    path.write_text("".join(json.dumps({"id": p.id, "text": p.text, "label": p.label}) + "\n" for p in passages))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", make_passages(50))


@pytest.fixture(scope="module")
def common(folders, data):  # noqa: F811
    """The options of most indexes here: 50 passages in 14 batches."""
    return ["--model", folders("gpt2"), "--data", data, "--id-field", "id", "--dim", 3, "--tokens-per-batch", 32]


@pytest.fixture(scope="module")
def made(tmp_path_factory, common):
    """An index, what the command printed, and the same in memory: (folder, result, compressor, workload, rows)."""
    folder = tmp_path_factory.mktemp("made") / "idx"
    done = run("index", *common, "--out", folder)
    model = TextModel(common[1])
    work = model.workload(make_passages(50), tokens_per_batch=32)
    compressor = dropinf.Compressor(work.model, dropinf.Dropout(3), work.loss_fn)
    return folder, done, compressor, model, compressor.compress(work.batches)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To rounding in float32."""
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 1e-5


QUERIES = [" ".join(WORDS[:4]), " ".join(WORDS[2:13]), " ".join(WORDS[5:7])]


@functools.cache
def fisher_of(rows, kind="block", damping="auto"):
    return dropinf.build_fisher(rows, kind, damping)


def query_rows(made):
    """The gradients of QUERIES, one by one."""
    _, _, compressor, model, _ = made
    parts = [compressor.compress(model.workload([Passage("", text)]).batches) for text in QUERIES]
    return dropinf.Gradients.cat(parts)


def test_index_keeps_what_the_api_gives(made, common, data):
    folder, done, _, model, rows = made
    index = dropinf.Index.open(folder)
    assert torch.equal(index[:].flat, rows.flat)
    assert dict(index.digest) == dict(rows.digest)
    order = [i for batch in model.workload(make_passages(50), tokens_per_batch=32).batches for i in batch["ids"]]
    assert index.ids() == order
    assert order != [p.id for p in make_passages(50)]  # the longest first
    kept = read_passages(folder / "passages.jsonl", id_field="id")
    assert [(p.id, p.text) for p in kept] == [(p.id, p.text) for p in make_passages(50)]
    close(index.fisher().solve(rows).flat, fisher_of(rows).solve(rows).flat)
    about = index.info()["about"]
    assert (about["model"], about["task"], about["max_tokens"], about["loss"]) == (common[1], "causal-lm", "32", "mean")
    assert done.stdout == ""
    assert re.search(r"compressed 50 samples in [\d.]+ s, [\d.,e+]+ a second", done.stderr)
    assert f"{folder}: 50 samples, " in done.stderr
    assert done.stderr.splitlines()[-1] == f'next: dropinf query {folder} --text "..."'
    assert verify(folder) == []


@pytest.mark.parametrize("kind", ["influence", "dot", "cosine", "relative"])
def test_query_is_score(made, kind):
    folder, _, _, _, rows = made
    arguments = [x for text in QUERIES for x in ("--text", text)]
    found = query_json(folder, *arguments, "--kind", kind, "--top", 4)
    fisher = fisher_of(rows)
    assert found.keys() == {"index", "samples", "kind", "fisher", "queries"}
    reads = kind in ("influence", "relative")
    facts = (str(folder), 50, kind, "block, damping auto" if reads else "not used")
    assert (found["index"], found["samples"], found["kind"], found["fisher"]) == facts
    expected = dropinf.score(query_rows(made), rows, fisher if reads else None, kind=kind)
    names, texts = dropinf.Index.open(folder).ids(), {p.id: p.text for p in make_passages(50)}
    assert [(q["id"], q["text"], q["image"]) for q in found["queries"]] == [
        (str(i), t, None) for i, t in enumerate(QUERIES)
    ]
    for query, scores in zip(found["queries"], expected, strict=True):
        assert query.keys() == {"id", "text", "image", "proponents", "opponents"}
        for side, sign in (("proponents", -1), ("opponents", 1)):
            best = (sign * scores).sort(stable=True).indices[:4].tolist()
            assert [s["position"] for s in query[side]] == best
            for sample, i in zip(query[side], best, strict=True):
                assert sample.keys() == {"position", "id", "score", "text", "image"}
                assert (sample["id"], sample["text"], sample["image"]) == (names[i], texts[names[i]], None)
                assert sample["score"] == pytest.approx(
                    float(scores[i]), rel=1e-4, abs=1e-6 * float(scores.abs().max())
                )


def test_queries_of_a_file_stay_in_order(made, tmp_path):
    folder, _, _, _, rows = made
    path = write_jsonl(tmp_path / "queries.jsonl", [Passage(n, t) for n, t in zip("xyz", QUERIES, strict=True)])
    found = query_json(folder, "--data", path, "--id-field", "id", "--no-opponents", "--damping", "0.5")
    assert [(q["id"], q["text"]) for q in found["queries"]] == list(zip("xyz", QUERIES, strict=True))
    assert found["fisher"] == "block, damping 0.5"
    best = dropinf.score(query_rows(made), rows, fisher_of(rows).with_damping(0.5), top=10)
    for query, values, positions in zip(found["queries"], best.values, best.indices, strict=True):
        assert [s["position"] for s in query["proponents"]] == positions.tolist()
        assert [s["score"] for s in query["proponents"]] == pytest.approx(values.tolist(), rel=1e-4)
        assert query["opponents"] == []


def test_tables(made, monkeypatch):
    folder = made[0]
    arguments = ["query", folder, "--text", QUERIES[0] + "\x1b[31m red\n[bold]", "--top", 3]
    found = json.loads(run(*arguments, "--json").stdout)["queries"][0]
    shown = run(*arguments).stdout
    assert "\x1b" not in shown  # neither colours nor what a text brings
    lines = shown.splitlines()
    assert lines[0] == f"Query 0: {QUERIES[0]} [31m red [bold]"
    rows = [
        f"{i} {s['score']:+.4g} {s['id']} {s['text']}"
        for side in ("proponents", "opponents")
        for i, s in enumerate(found[side], 1)
    ]
    assert [" ".join(line.split()) for line in lines if line[:1].isdigit()] == rows
    assert [line.strip() for line in lines if line.strip() in ("Proponents", "Opponents")] == [
        "Proponents",
        "Opponents",
    ]
    assert "Opponents" not in run(*arguments, "--no-opponents").stdout
    monkeypatch.setenv("COLUMNS", "40")
    narrow = run(*arguments).stdout.splitlines()
    assert max(map(len, narrow)) <= 40
    assert sum("…" in line for line in narrow) >= 3


def test_pages(made, tmp_path):
    pages = pytest.importorskip("dropinf.pages")
    result = tmp_path / "result.json"
    done = run("query", made[0], "--text", QUERIES[0], "--json", "--html", tmp_path / "a.html")
    result.write_text(done.stdout)
    run("report", result, "-o", tmp_path / "b.html")
    run("report", "-", "-o", tmp_path / "c.html", stdin=done.stdout)
    expected = pages.query_page(json.loads(done.stdout))
    assert QUERIES[0] in expected
    assert all((tmp_path / f"{name}.html").read_text() == expected for name in "abc")
    run("report", result, "-o", tmp_path / "d.html", "--title", "Brown")
    assert "<title>Brown</title>" in (tmp_path / "d.html").read_text()
    result.write_text('{"index": 3')
    assert re.match(
        r"\S+result.json: not JSON \(.*\); pass what dropinf query --json",
        error_of("report", result, "-o", tmp_path / "e.html"),
    )
    result.write_text("{}")
    assert "result has no " in error_of("report", result, "-o", tmp_path / "e.html")
    assert not (tmp_path / "e.html").exists()


def test_self_influence(made, tmp_path):
    folder, _, _, _, rows = made
    values = dropinf.self_influence(rows, fisher_of(rows))
    done = run("self-influence", folder, "--top", 5, "--json", "--out", tmp_path / "all.npy")
    found = json.loads(done.stdout)
    assert found.keys() == {"index", "samples", "fisher", "self_influence"}
    order = values.sort(descending=True, stable=True).indices[:5].tolist()
    names, texts = dropinf.Index.open(folder).ids(), {p.id: p.text for p in make_passages(50)}
    got = found["self_influence"]
    assert [(s["position"], s["id"], s["text"]) for s in got] == [(i, names[i], texts[names[i]]) for i in order]
    assert [s["score"] for s in got] == pytest.approx(values[order].tolist(), rel=1e-4)
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), values, rtol=1e-4)
    table = run("self-influence", folder, "--top", 5).stdout
    assert re.findall(r"^\d+ .*? (p\d+) ", table, re.M) == [names[i] for i in order]
    heavy = json.loads(run("self-influence", folder, "--damping", 3, "--json").stdout)["self_influence"]
    expected = dropinf.self_influence(rows, fisher_of(rows).with_damping(3.0)).max()
    assert heavy[0]["score"] == pytest.approx(float(expected), rel=1e-4)
    run("self-influence", folder, "--out", tmp_path / "all.txt", code=2)


def test_fisher_and_export(common, made, tmp_path):
    rows, folder = made[4], tmp_path / "idx"
    run("index", *common, "--out", folder, "--fisher", "none")
    asked = ["query", folder, "--text", QUERIES[0]]
    assert error_of(*asked) == (
        f"{folder}: no Fisher matrix in it; build one with: dropinf fisher {folder}, or ask for --kind dot or cosine"
    )
    assert "build one with" in error_of("export", folder, tmp_path / "rows.npy")
    run(*asked, "--kind", "cosine")
    assert run("fisher", folder, "--kind", "kronecker", "--damping", "0.2").stdout == ""
    fisher = dropinf.build_fisher(rows, "kronecker", 0.2)
    index = dropinf.Index.open(folder)
    assert (index.fisher().kind, index.fisher().damping) == ("kronecker", 0.2)
    first = query_json(folder, "--text", QUERIES[0])["queries"][0]["proponents"][0]
    assert first["score"] == pytest.approx(float(dropinf.score(query_rows(made)[:1], rows, fisher).max()), rel=1e-3)
    for suffix in ("npy", "safetensors"):
        run("export", folder, tmp_path / f"rows.{suffix}")
    torch.testing.assert_close(
        torch.from_numpy(np.load(tmp_path / "rows.npy")), fisher.whiten(rows).flat, rtol=1e-3, atol=1e-3
    )
    faiss = pytest.importorskip("faiss")
    run("export", folder, tmp_path / "rows.faiss")
    assert faiss.read_index(str(tmp_path / "rows.faiss")).ntotal == 50
    assert "must end in .npy" in error_of("export", folder, tmp_path / "rows.txt")
    assert run("verify", folder).stdout == "sound\n"


def test_info(made):
    folder = made[0]
    found = json.loads(run("info", folder, "--json").stdout)
    assert found == dropinf.Index.open(folder).info()
    shown = run("info", folder).stdout
    numbers = sum(int(np.prod(shape)) for shape in found["layers"].values())
    assert f"50 x {numbers:,} numbers of {len(found['layers'])} layers, float32" in shown
    assert re.search(r"^max tokens +32$", shown, re.M)


def test_verify_says_what_is_wrong(common, tmp_path):
    folder = tmp_path / "idx"
    run("index", *common, "--out", folder, "--limit", 9)
    assert run("verify", folder).stdout == "sound\n"
    (folder / "passages.jsonl").write_text("{}\n")
    asked = ["query", folder, "--text", QUERIES[0]]
    assert f"passages.jsonl, line 1: damaged; see dropinf verify {folder}" in error_of(*asked)
    shard = sorted((folder / "shards").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert f"{shard}: damaged" in error_of(*asked)
    done = run("verify", folder, code=1)
    assert len(done.stdout.splitlines()) == 2
    assert f"{shard}: damaged" in done.stdout
    assert f"{folder / 'passages.jsonl'}: damaged" in done.stdout


def stop_at(monkeypatch, batch: int):
    """Ctrl-C as the batch of that number is made."""
    build = TextBatches.__getitem__

    def stop(self, index):
        if index == batch and len(self) > batch:
            raise KeyboardInterrupt
        return build(self, index)

    monkeypatch.setattr(TextBatches, "__getitem__", stop)


@pytest.mark.parametrize("how", [["--sampling", "energy"], ["--packed"]])
def test_an_interrupted_index_goes_on(common, how, tmp_path, monkeypatch):
    options = [*common, *how, "--calibration", 8]
    run("index", *options, "--out", tmp_path / "whole")
    count = len(dropinf.Index.open(tmp_path / "whole").manifest.runs[0].shards)
    assert count > 8
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        done = run("index", *options, "--out", tmp_path / "idx", code=130)
    assert done.stderr.splitlines()[-1] == "dropinf: stopped; run the same command again to go on"
    assert "not finished; run the same compress again" in error_of("info", tmp_path / "idx")
    assert "not finished" in run("verify", tmp_path / "idx", code=1).stdout
    with monkeypatch.context() as patch:
        patch.setattr(dropinf.Compressor, "calibrate", lambda *_, **__: pytest.fail("it calibrates again"))
        run("index", *options, "--out", tmp_path / "idx")
        assert files(tmp_path / "idx") == files(tmp_path / "whole")
        assert "nothing was left to compress" in run("index", *options, "--out", tmp_path / "idx").stderr
    assert files(tmp_path / "idx") == files(tmp_path / "whole")


def shuffled(passages, count, seed):
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(seed))[:count]
    return [passages[i] for i in order.tolist()]


def test_calibration_is_on_random_passages(common, made, tmp_path):
    model, passages = made[3], make_passages(50)
    for seed in (0, 5):
        folder = tmp_path / f"energy{seed}"
        done = run("index", *common, "--sampling", "energy", "--calibration", 7, "--seed", seed, "--out", folder)
        assert "calibrating on 7 samples in random order" in done.stderr
        part = model.workload(shuffled(passages, 7, seed), tokens_per_batch=32, packed=True)
        sketch = dropinf.Dropout(3, sampling="energy", seed=seed)
        expected = dropinf.Compressor(part.model, sketch, part.loss_fn, cu_seqlens=part.cu_seqlens)
        expected.calibrate(part.batches)
        assert dict(dropinf.Index.open(folder).digest) == expected.digest()


def test_a_budget(common, made, tmp_path):
    folder = tmp_path / "idx"
    options = [x for x in common if x not in ("--dim", 3)]
    done = run(
        "index",
        *options,
        "--budget-bytes",
        600,
        "--calibration",
        9,
        "--layers",
        "*.mlp.*",
        "--layers",
        "*ln_f*",
        "--out",
        folder,
    )
    part = made[3].workload(shuffled(make_passages(50), 9, 0), tokens_per_batch=32, packed=True)
    options = {"layers": ["*.mlp.*", "*ln_f*"], "cu_seqlens": part.cu_seqlens}
    choice = dropinf.choose(part.model, part.batches, part.loss_fn, budget_bytes=600, **options)
    expected = dropinf.Compressor(part.model, choice.sketch, part.loss_fn, **options)
    expected.calibrate(part.batches)
    index = dropinf.Index.open(folder)
    assert dict(index.digest) == expected.digest()
    assert index.bytes_per_sample == choice.bytes_per_sample <= 600
    assert str(choice).splitlines()[-1] in done.stderr.splitlines()
    assert len(query_json(folder, "--text", QUERIES[1])["queries"][0]["proponents"]) == 10


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--dim", 4], "was made with --dim 3, and this is --dim 4; run the same command again, or name another"),
        (["--seed", 1], "was made with --seed 0, and this is --seed 1"),
        (["--layers", "*mlp*", "--layers", "*attn*"], "was made with no --layers, and this is --layers *mlp* --layers *attn*"),
        (["--packed"], "was made with no --packed, and this is --packed"),
        (["--dtype", "int8"], "was made with --dtype float32, and this is --dtype int8"),
        (["--max-tokens", 9], "was made with --max-tokens 32, and this is --max-tokens 9"),
        (["--limit", 49], "its passages are others than those of the data now, from line 50 on; pass the data of then"),
        (["--limit", 20], "holds others' gradients; pass --append to add these, or name another folder"),
        (["--model", "other"], "its weights are not those that"),
    ],
)  # fmt: skip
def test_another_command_is_refused(common, made, folders, changed, message):  # noqa: F811
    if changed[1:] == ["other"]:
        changed = ["--model", folders("gpt2", initializer_range=0.2)]
    before = files(made[0])
    assert message in error_of("index", *common, *changed, "--out", made[0])
    assert files(made[0]) == before


def test_changed_passages_are_refused(common, made, tmp_path):
    """Of the same tokens, which the checksum of a batch cannot tell apart."""
    passages = make_passages(50)
    passages[7] = Passage("other", passages[7].text, 0)
    before = files(made[0])
    other = write_jsonl(tmp_path / "other.jsonl", passages)
    message = error_of("index", *common, "--data", other, "--out", made[0])
    assert message.startswith(
        f"{made[0] / 'passages.jsonl'}: its passages are others than those of the data now, from line 8 on"
    )
    assert files(made[0]) == before
    lost = made[0] / "passages.jsonl"
    kept = lost.read_bytes()
    lost.unlink()
    run("index", *common, "--out", made[0])
    assert lost.read_bytes() == kept


def test_the_model_of_a_query(made, folders, tmp_path):  # noqa: F811
    """It may have moved, but must be the same."""
    shutil.copytree(folders("gpt2"), tmp_path / "moved")
    ask = ["query", made[0], "--text", QUERIES[0], "--json"]
    assert run(*ask, "--model", tmp_path / "moved").stdout == run(*ask).stdout
    message = error_of(*ask, "--model", folders("gpt2", initializer_range=0.2))
    assert message == (
        f"model: its weights are not those that {made[0]} was made with; pass the model of then, in the same dtype"
    )


def test_warnings_are_lines(common, tmp_path):
    err = run("index", *common, "--max-tokens", 5, "--out", tmp_path / "idx").stderr
    cut = sum(len(p.text.split()) > 5 for p in make_passages(50))
    assert f"dropinf: {cut} of 50 passages are longer than 5 tokens and were cut" in err.splitlines()
    assert "Warning" not in err


def test_folders_of_others_are_left_alone(common, tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "no index and not empty (it has 'thesis.tex')" in error_of("index", *common, "--out", tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    write_jsonl(own / "passages.jsonl", make_passages(3, 8))
    kept = (own / "passages.jsonl").read_bytes()
    assert "it is there already, with other passages" in error_of("index", *common, "--out", own)
    assert (own / "passages.jsonl").read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir() if p.name != "own"] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "tolerance"), [(["--packed"], 1e-4), (["--dtype", "bfloat16"], 0.05), (["--dtype", "int8"], 0.1)]
)
def test_packed_rows_and_narrow_numbers_score_alike(common, made, options, tolerance, tmp_path):
    folder = tmp_path / "idx"
    run("index", *common, *options, "--out", folder)
    ask = ["--text", QUERIES[1], "--kind", "dot", "--top", 50, "--no-opponents"]
    found, expected = (
        {s["id"]: s["score"] for s in query_json(path, *ask)["queries"][0]["proponents"]} for path in (folder, made[0])
    )
    assert found.keys() == expected.keys()
    largest = max(map(abs, expected.values()))
    assert max(abs(found[i] - expected[i]) for i in expected) < tolerance * largest
    batches = [dropinf.Index.open(path).manifest.runs[0].batches for path in (folder, made[0])]
    assert (batches[0] == batches[1]) == ("--packed" not in options)
    if "--dtype" in options:
        assert json.loads(run("info", folder, "--json").stdout)["dtype"] == options[1]


def test_classifiers(folders, data, tmp_path):  # noqa: F811
    folder, model = tmp_path / "idx", folders("bert", pad=True)
    options = ["--model", model, "--data", data, "--dim", 3, "--tokens-per-batch", 40, "--out", folder]
    assert "passage 0: label is None" in error_of("index", *options)
    assert "name their field with --label-field" in error_of("index", *options)
    run("index", *options, "--label-field", "label")
    loaded = TextModel(model)
    passages = [Passage(str(i), p.text, p.label) for i, p in enumerate(make_passages(50))]
    work = loaded.workload(passages, tokens_per_batch=40)
    compressor = dropinf.Compressor(work.model, dropinf.Dropout(3), work.loss_fn)
    rows = compressor.compress(work.batches)
    assert sorted(dropinf.Index.open(folder).ids(), key=int) == [p.id for p in passages]
    found = query_json(folder, "--text", "the cat", "--label", 2, "--kind", "cosine", "--top", 50)["queries"][0]
    query = compressor.compress(loaded.workload([Passage("", "the cat", 2)]).batches)
    expected = dropinf.score(query, rows, kind="cosine")[0]
    for sample in found["proponents"]:
        assert sample["score"] == pytest.approx(float(expected[sample["position"]]), abs=1e-4)
    assert "label is None" in error_of("query", folder, "--text", "the cat")
    run("query", folder, "--text", "the cat", "--label", 2, "--label", 1, code=2)


@pytest.mark.parametrize("named", [True, False])
def test_appended_passages(common, made, named, tmp_path):
    folder, more = tmp_path / "idx", make_passages(11, 3, "q")
    options = common if named else [x for x in common if x not in ("--id-field", "id")]
    second = ["--data", write_jsonl(tmp_path / "more.jsonl", more), "--append", "--out", folder]
    run("index", *options, "--out", folder)
    first = files(folder)
    run("index", *options, *second)
    index = dropinf.Index.open(folder)
    every = [*make_passages(50), *more]
    if not named:
        every = [Passage(str(i), p.text) for i, p in enumerate(every)]
    kept = read_passages(folder / "passages.jsonl", id_field="id")
    assert [(p.id, p.text) for p in kept] == [(p.id, p.text) for p in every]
    assert torch.equal(index[:50].flat, made[4].flat)
    added = made[3].workload(every[50:], tokens_per_batch=32)
    assert torch.equal(index[50:].flat, made[2].compress(added.batches).flat)
    assert index.ids(slice(50, None)) == [i for batch in added.batches for i in batch["ids"]]
    assert index.fisher().count == 61
    samples = query_json(folder, "--text", QUERIES[0], "--top", 61)["queries"][0]["proponents"]
    texts = {p.id: p.text for p in every}
    assert len(samples) == 61
    assert all(sample["text"] == texts[sample["id"]] for sample in samples)
    assert run("verify", folder).stdout == "sound\n"
    whole = files(folder)
    for again in ([], second):  # either command finds its own there
        assert "nothing was left to compress" in run("index", *options, *again, "--out", folder).stderr
        assert files(folder) == whole
    # Ended between the passages and the manifest.
    for name, content in first.items():
        (folder / name).write_bytes(content)
    (folder / "passages.jsonl").write_bytes(whole["passages.jsonl"])
    assert "passages.jsonl: damaged" in run("verify", folder, code=1).stdout
    run("index", *options, *second)
    assert files(folder) == whole
    if named:
        clash = write_jsonl(tmp_path / "clash.jsonl", [Passage("p3", "two dogs ran far away")])
        assert "id 'p3' is there already; ids must be unique" in error_of(
            "index", *options, "--data", clash, *second[2:]
        )
        assert files(folder) == whole


@pytest.fixture
def loader(tmp_path, monkeypatch):
    """A folder with a module for --loader, as the current one."""
    (tmp_path / "my_model.py").write_text(LOADER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    yield tmp_path
    sys.modules.pop("my_model", None)


def test_any_model_by_a_loader(loader):
    done = run("index", "--loader", "my_model:load", "--dim", 4, "--out", "idx")
    assert "next: dropinf query idx --loader my_model:load" in done.stderr
    import my_model

    work, asked = my_model.load(), my_model.queries()
    compressor = dropinf.Compressor(work.model, dropinf.Dropout(4), work.loss_fn)
    rows, query = compressor.compress(work.batches).to(torch.float32), compressor.compress(asked.batches)
    assert torch.equal(dropinf.Index.open("idx")[:].flat, rows.flat)
    found = query_json("idx", "--loader", "my_model:queries", "--top", 3)
    best = dropinf.score(query, rows, fisher_of(rows), top=3)
    assert [q["id"] for q in found["queries"]] == [i for batch in asked.batches for i in asked.ids(batch)]
    names = [i for batch in work.batches for i in work.ids(batch)]
    for got, values, positions in zip(found["queries"], best.values.tolist(), best.indices.tolist(), strict=True):
        assert (got["text"], got["image"]) == (None, None)
        assert [(s["position"], s["id"], s["text"]) for s in got["proponents"]] == [
            (i, names[i], None) for i in positions
        ]
        assert [s["score"] for s in got["proponents"]] == pytest.approx(values, rel=1e-4)
    assert names[best.indices[0, 0]] in run("query", "idx", "--loader", "my_model:queries").stdout
    # An index of the Python API too, of some of the layers.
    part = dropinf.Compressor(work.model, dropinf.Dropout(4), work.loss_fn, layers=["2"])
    part.compress(work.batches, out="part", ids=work.ids)
    found = query_json("part", "--loader", "my_model:queries", "--kind", "dot", "--top", 1)
    expected = dropinf.score(part.compress(asked.batches), part.compress(work.batches), kind="dot", top=1)
    assert [q["proponents"][0]["score"] for q in found["queries"]] == pytest.approx(expected.values.flatten().tolist())
    assert "was not made from passages by dropinf index; pass its queries with --loader" in error_of(
        "query", "part", "--text", "a", "--kind", "dot"
    )


@pytest.mark.parametrize(
    ("loader_name", "message"),
    [
        ("my_model", "loader: 'my_model' must be module:function"),
        ("my_model:nothing", "loader: my_model has no function 'nothing'"),
        ("my_model:number", "loader: my_model:number returned int; it must return a dropinf.transformer.Workload"),
        ("not_there:load", "No module named 'not_there'"),
    ],
)
def test_what_is_wrong_with_a_loader(loader, loader_name, message):
    assert error_of("index", "--loader", loader_name, "--out", "idx").startswith(message)


def test_a_loader_calibrates_on_random_batches(loader):
    run("index", "--loader", "my_model:load", "--dim", 2, "--sampling", "energy", "--calibration", 4, "--out", "idx")
    import my_model

    work = my_model.load()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    expected = dropinf.Compressor(work.model, dropinf.Dropout(2, sampling="energy"), work.loss_fn)
    expected.calibrate([work.batches[i] for i in order[:2]])  # of three samples each
    assert dict(dropinf.Index.open("idx").digest) == expected.digest()


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **changes}


def test_control_c(loader):
    """In a process of its own."""
    (loader / "my_model.py").write_text(LOADER.replace("DELAY = 0.0", "DELAY = 0.5"))
    command = [sys.executable, "-m", "dropinf.cli", "index", "--loader", "my_model:load", "--dim", "4", "--out", "idx"]
    # Where the tests run in the background, the signal is ignored, and processes inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        deadline = time.monotonic() + 60
        while not list(loader.glob("idx/shards/*")) + list(loader.glob("idx/parts/*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "dropinf: stopped; run the same command again to go on"
    (loader / "my_model.py").write_text(LOADER)
    for folder in ("idx", "whole"):
        run("index", "--loader", "my_model:load", "--dim", 4, "--out", folder)
    assert files(loader / "idx") == files(loader / "whole")


def test_ranks_of_torchrun_make_the_same_index(loader):
    """Rank 1 draws another sketch, as rounding might make it do, and takes that of rank 0."""
    drawn = (
        LOADER
        + """
import os
from dropinf import indexing

if os.environ.get("RANK") == "1":
    indexing._shuffled = lambda count, seed: range(count)
"""
    )
    (loader / "my_model.py").write_text(drawn)
    arguments = ["index", "--loader", "my_model:load", "--dim", "2", "--sampling", "energy", "--calibration", "9"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dropinf.cli",
    ]
    done = subprocess.run(
        [*torchrun, *arguments, "--out", "idx"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert (
        done.stderr.count("compressed 36 samples in ")
        == done.stderr.count("next: ")
        == done.stderr.count("calibrating")
        == 1
    )
    run(*arguments, "--out", "whole")
    made, whole = files(loader / "idx"), files(loader / "whole")
    fishers = [kept.pop("fisher.safetensors") for kept in (made, whole)]  # of sums in another order
    assert len(fishers) == 2
    for kept in (made, whole):
        kept.pop("manifest.json")  # which has their checksum
    assert made == whole
    first, second = (dropinf.Index.open(loader / name) for name in ("idx", "whole"))
    torch.testing.assert_close(first.fisher().solve(first[:]).flat, second.fisher().solve(first[:]).flat)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["query", "none", "--text", "a"], "none: no index (it has no manifest.json); make one with dropinf index --out none"),
        (["info", "none"], "none: no index"),
        (["verify", "none"], "none: no index"),
        (["report", "none.json", "-o", "x.html"], "none.json: No such file or directory"),
        (["index", "--model", "none", "--data", "none.jsonl", "--out", "idx"], "none.jsonl: no such file"),
        (["index", "--model", "DATA", "--data", "DATA", "--out", "idx"], "model DATA: transformers cannot load it ("),
        (["index", "--model", "MODEL", "--data", "DATA", "--text-field", "body", "--out", "idx"], "DATA, line 1: no field 'body'; its fields are id, text, label: name one with --text-field"),
        (["index", "--model", "MODEL", "--data", "DATA", "--max-tokens", "99", "--out", "idx"], "max_tokens is 99; it must be at least 2 and at most 32"),
        (["index", "--model", "MODEL", "--data", "DATA", "--layers", "*.conv.*", "--out", "idx"], "layers: '*.conv.*' matches no module or parameter"),
        (["index", "--model", "MODEL", "--data", "DATA", "--budget-bytes", "8", "--calibration", "2", "--out", "idx"], "budget_bytes is 8; "),
        (["index", "--model", "MODEL", "--data", "DATA", "--device", "cuda", "--out", "idx"], "device is 'cuda', and torch finds no GPU here"),
        (["index", "--model", "MODEL", "--data", "DATA", "--device", "cdua", "--out", "idx"], "device is 'cdua'; it must be cpu, cuda"),
    ],
)  # fmt: skip
def test_errors_are_one_line(arguments, message, folders, data, tmp_path, monkeypatch):  # noqa: F811
    if "'cuda'" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": folders("gpt2"), "DATA": str(data)}
    found = error_of(*(places.get(a, a) for a in arguments))
    assert found.startswith(message.replace("DATA", str(data)))
    with pytest.raises((ValueError, OSError)):
        testing.CliRunner().invoke(
            cli.build_app(), ["--debug", *(places.get(a, a) for a in arguments)], catch_exceptions=False
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "--out", "idx"], "pass --model and --data, or --loader"),
        (["index", "--out", "idx", "--loader", "a:b", "--model", "c"], "leave --model and --data out"),
        (["index", "--out", "idx", "--loader", "a:b", "--dim", "3", "--budget-bytes", "9"], "leave --dim and --sampling out"),
        (["index", "--out", "idx", "--loader", "a:b", "--damping", "much"], "'much' is neither auto nor a number"),
        (["index", "--out", "idx", "--loader", "a:b", "--damping", "nan"], "'nan' is neither auto nor a number"),
        (["index", "--out", "idx", "--loader", "a:b", "--fisher", "full"], "'full' is not one of"),
        (["query", "idx"], "pass one of --text, --data and --loader"),
        (["query", "idx", "--text", "a", "--data", "b"], "pass one of --text, --data and --loader"),
        (["query", "idx", "--text", "a", "--kind", "dot", "--damping", "1"], "--kind dot reads no Fisher matrix"),
        (["fisher", "idx", "--damping", "-1"], "'-1' is neither auto nor a number"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(arguments, message, made, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = run(*(str(made[0]) if a == "idx" and arguments[0] == "query" else a for a in arguments), code=2)
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("missing", "arguments", "wanted"),
    [
        ("transformers", ["index", "--model", "m", "--data", "DATA", "--out", "idx"], "'dropinf[hf]'"),
        ("gguf", ["index", "--model", "a/m.gguf", "--data", "DATA", "--out", "idx"], "gguf"),
        ("datasets", ["index", "--model", "m", "--data", "some/data", "--out", "idx"], "datasets"),
        ("pyarrow", ["index", "--model", "m", "--data", "a.parquet", "--out", "idx"], "pyarrow"),
        ("faiss", ["export", "MADE", "rows.faiss"], "'dropinf[faiss]'"),
        ("rich", ["self-influence", "MADE"], "'dropinf[cli]'"),
        ("sklearn", ["demo"], "'dropinf[demo]'"),
    ],
)
def test_a_library_that_is_missing(missing, arguments, wanted, made, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch()
    for name in [n for n in sys.modules if n == missing or n.startswith(f"{missing}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "sklearn":
        monkeypatch.delitem(sys.modules, "dropinf.demo", raising=False)
    places = {"DATA": str(data), "MADE": str(made[0])}
    found = error_of(*(places.get(a, a) for a in arguments))
    assert found == f"this command needs {missing}; install it with: pip install {wanted}"


def test_without_typer(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    for module in ("indexing", "commands", "doctor"):
        monkeypatch.delitem(sys.modules, f"dropinf.{module}", raising=False)
    for command, wanted in (("info", "cli"), ("demo", "demo")):
        monkeypatch.setattr(sys, "argv", ["dropinf", command])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 1
        found = capsys.readouterr().err
        assert found == f"dropinf: this command needs typer; install it with: pip install 'dropinf[{wanted}]'\n"


def test_doctor(monkeypatch):
    shown = run("doctor").stdout
    for name, value in (("torch", torch.__version__), ("numpy", np.__version__), ("dropinf", "0.1.0")):
        assert re.search(rf"^{name} +{re.escape(value)}$", shown, re.M)
    assert re.search(r"^self-check +compress_linear on \w+ equals float64 to rounding$", shown, re.M)
    if not torch.cuda.is_available():
        assert re.search(r"^GPU +none", shown, re.M)
        assert re.search(r"^kernels +plain PyTorch, as there is no GPU$", shown, re.M)
    assert re.search(r"^int8 products +in ", shown, re.M)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert re.search(r"^gguf +missing: pip install gguf \(GGUF files\)$", run("doctor").stdout, re.M)
    right = doctor.ops.compress_linear
    monkeypatch.setattr(doctor.ops, "compress_linear", lambda *tables: right(*tables) * 1.01)
    assert "broken: compress_linear on " in run("doctor", code=1).stdout

    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor.ops, "compress_linear", fail)
    assert "fails on " in run("doctor", code=1).stdout


def test_help_imports_no_model_library():
    code = (
        "import sys; sys.argv = ['dropinf', 'index', '--help']\n"
        "from dropinf.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('transformers', 'datasets', 'pyarrow', 'sklearn', 'matplotlib', 'faiss') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--budget-bytes" in done.stdout
    assert "dropinf.transformer.Workload(model, loss_fn, batches, ids)" in done.stdout
    assert "\x1b" not in done.stdout
