"""Files that an earlier version wrote are read as it read them: `fixtures/make_fixtures.py` made them and what to expect.

What is only read must be equal bit for bit. What is multiplied may differ in rounding, as CPUs add in another order.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dropinf
from dropinf.cli import main
from dropinf.index.manifest import VERSION
from tests.index.fixtures import make_fixtures as made

FIXTURES = Path(__file__).parent / "fixtures"
PLAIN = json.loads((FIXTURES / "expected.json").read_text())
TENSORS = load_file(FIXTURES / "expected.safetensors")
DTYPES = list(made.DTYPES)
UNFINISHED = ("unfinished", "unfinished_append")


@pytest.fixture(scope="module")
def data():
    return made.Data(FIXTURES)


@pytest.fixture(scope="module")
def query(data):
    """The queries' gradients as they were: what the scores expected are of."""
    now = data.query()
    return dropinf.Gradients(TENSORS["query/rows"], now.shapes, now.digest)


@pytest.fixture
def copy(tmp_path):
    """Make a copy of a fixture that may be written to."""
    return lambda name: Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def expected(place: str) -> dict[str, Tensor]:
    found = {k.removeprefix(f"{place}/"): x for k, x in TENSORS.items() if k.startswith(f"{place}/")}
    return {name: x for name, x in found.items() if "/" not in name}


def near(found: Tensor, wanted: Tensor, what: str) -> None:
    """To rounding of float32, in which rows are multiplied, times the condition of a damped matrix of thirty columns."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), what
    error = float((found - wanted).norm() / wanted.norm())
    assert error <= 100 * torch.finfo(torch.float32).eps, f"{what}: relative error {error:.1e}"


def compare(found: dict[str, Tensor], place: str) -> None:
    """All results are there, of the same dtype and to rounding; the best samples are the same ones."""
    wanted = expected(place)
    assert wanted.keys() == found.keys()
    for name, x in wanted.items():
        if name.endswith(".indices"):
            assert torch.equal(found[name], x), f"{place}/{name}"
        else:
            near(found[name], x, f"{place}/{name}")


def assert_rows(index: dropinf.Index, name: str) -> None:
    """What the index holds is bit for bit what it held."""
    assert dropinf.Index.open(index.path).verify() == []
    assert made.facts(index) == PLAIN[name]
    assert_equal(index[:].flat, TENSORS[f"{name}/rows"])
    assert_equal(torch.cat([part.flat for _, part in index.blocks(7)]), TENSORS[f"{name}/rows"])


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def test_the_files_are_of_an_earlier_version():
    assert len(PLAIN["commit"]) == 40
    assert {name: made.facts(dropinf.Index.open(FIXTURES / name))["info"]["dtype"] for name in DTYPES} == {
        name: name for name in DTYPES
    }


def test_queries_are_compressed_as_before(data):
    near(data.query().flat, TENSORS["query/rows"], "query")


@pytest.mark.parametrize("name", DTYPES)
def test_an_index_holds_what_it_held(name):
    assert_rows(dropinf.Index.open(FIXTURES / name), name)


@pytest.mark.parametrize("kind", made.FISHERS)
@pytest.mark.parametrize("name", DTYPES)
def test_a_fisher_of_an_index_scores_as_before(name, kind, query):
    index = dropinf.Index.open(FIXTURES / name)
    fisher = dropinf.build_fisher(index, kind, **made.FISHERS[kind])
    compare(made.influences(index, query, fisher), f"{name}/{kind}")


@pytest.mark.parametrize("name", DTYPES)
def test_the_fisher_kept_with_an_index_scores_as_before(name, query):
    index = dropinf.Index.open(FIXTURES / name)
    fisher = index.fisher()
    assert (fisher.kind, fisher.count) == (made.KEPT[name], len(index))
    compare(made.scores(index, query, fisher), f"{name}/kept")


@pytest.mark.parametrize("name", UNFINISHED)
def test_an_unfinished_index_goes_on(name, data, query, copy):
    """What it had stays as it was, and the rest is as the run would have made it."""
    folder, append = copy(name), name == "unfinished_append"
    assert any("not finished" in problem for problem in dropinf.index.verify(folder))
    kept = {path: path.read_bytes() for path in folder.glob("shards/*")}
    part = next(folder.glob("parts/*"), None)
    assert kept
    assert (part is None) == append
    calls: list[int] = []
    compressor = data.compressor()
    options = {"append": True} if append else {"fisher": "block"}
    batches = Counted(data.more if append else data.first, calls)
    index = compressor.compress(batches, out=folder, ids=made.names, **options)
    # Without fingerprints: the ids of what was done are compared, and its first and last rows.
    assert sorted(set(calls)) == list(range(len(batches)))
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert but_bytes(made.facts(index)) == but_bytes(PLAIN[name])
    assert index.verify() == []
    assert json.loads((folder / "manifest.json").read_text())["version"] == VERSION
    rows, wanted = index[:].flat, TENSORS[f"{name}/rows"]
    before = sum(map(len, (x for x, _ in (data.first if append else data.first[: made.KILLED_AT]))))
    assert_equal(rows[:before], wanted[:before])
    if append:  # int8: rounding may end in a neighbouring value
        assert float(((rows - wanted).abs() / wanted.abs().amax(1, keepdim=True)).max()) < 0.02
    else:
        near(rows, wanted, name)
        compare(made.influences(index, query, index.fisher()), f"{name}/kept")


def but_bytes(facts: dict) -> dict:
    """New shards say more of themselves than those of before."""
    return {**facts, "info": {key: value for key, value in facts["info"].items() if key != "bytes"}}


class Counted(list):
    """Batches that note which of them were asked for."""

    def __init__(self, batches, calls: list[int]) -> None:
        super().__init__(batches)
        self.calls = calls

    def __getitem__(self, i):
        self.calls.append(i)
        return super().__getitem__(i)


@pytest.mark.parametrize("name", DTYPES)
def test_more_is_added_to_an_index(name, data, copy):
    folder = copy(name)
    before = dropinf.Index.open(folder)
    rows, ids = before[:].flat, before.ids()
    options = {} if name == "bfloat16" else {"ids": made.names}
    after = data.compressor().compress(data.queries, out=folder, append=True, dtype=made.DTYPES[name], **options)
    assert after.verify() == []
    assert len(after) == len(rows) + sum(made.QUERIES)
    assert_equal(after[: len(rows)].flat, rows)
    assert after.ids()[: len(rows)] == ids
    added, wanted = after[len(rows) :].flat.double(), TENSORS["query/rows"]
    coarse = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4, "int8": 0.02}[name]
    assert float((added - wanted).norm() / wanted.norm()) < coarse


@pytest.mark.parametrize("name", DTYPES)
def test_the_same_batches_again_change_nothing(name, data, copy):
    folder = copy(name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"}
    options = {} if name == "bfloat16" else {"ids": made.names}
    for batches in (data.first, data.more):
        if name == "float16":  # whose number was not known
            batches = made.without_length(batches)
        data.compressor().compress(batches, out=folder, append=True, **options)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert_rows(dropinf.Index.open(folder), name)


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("name", DTYPES)
def test_another_loss_is_refused(name, append, data, copy):
    """There are no fingerprints to compare, but rows."""
    options = {} if name == "bfloat16" else {"ids": made.names}
    compressor = data.compressor()
    other = dropinf.Compressor(compressor.model, dropinf.Dropout(3, seed=2), lambda m, b: 2 * made.loss_fn(m, b))
    batches = made.without_length(data.first) if name == "float16" else data.first
    with pytest.raises(ValueError, match="batch 0, computed again, has other gradients than the rows in"):
        other.compress(batches, out=copy(name), append=append, **options)


def test_an_append_that_begins_like_a_run_without_fingerprints(data, copy):
    """As long, too: with ids it is told apart, without them every row is compared, and it is refused."""
    more = [data.first[0], *((x + 1, y) for x, y in data.first[1:])]
    folder = copy("bfloat16")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="batch 1, computed again, has other gradients than the rows in"):
        data.compressor().compress(more, out=folder, append=True)
    assert all(path.read_bytes() == content for path, content in before.items())
    folder = copy("float64")
    rows = dropinf.Index.open(folder)[:].flat
    index = data.compressor().compress(more, out=folder, append=True, ids=made.names)
    assert_equal(index[:].flat, torch.cat([rows, data.compressor().compress(more).flat]))
    assert index.verify() == []


def test_gradients_are_read_as_they_were():
    read, plain = dropinf.Gradients.load(FIXTURES / "gradients.safetensors"), PLAIN["gradients"]
    assert_equal(read.flat, TENSORS["gradients/rows"])
    assert dict(read.digest) == plain["digest"]
    assert {name: list(shape) for name, shape in read.shapes.items()} == plain["shapes"]


@pytest.mark.parametrize("name", [*made.FISHERS, "rows", "uncorrected"])
def test_a_fisher_is_read_as_it_was(name, data, query):
    train = dropinf.Gradients.load(FIXTURES / "gradients.safetensors")
    fisher = dropinf.Fisher.load(FIXTURES / f"fisher-{name}.safetensors")
    assert repr(fisher) == PLAIN[f"fisher-{name}"]
    compare(made.influences(train, query, fisher), f"fisher-{name}")
    fisher.update(data.compressor().compress(data.more))
    compare({"solved": fisher.solve(query).flat}, f"fisher-{name}/more")


@pytest.mark.parametrize("name", made.SKETCHES)
def test_masks_are_read_as_they_were(name, data):
    place = f"masks-{name}"
    compressor = data.compressor(made.SKETCHES[name])
    compressor.load(FIXTURES / f"{place}.safetensors")
    assert compressor.digest() == PLAIN[place]
    compare({"rows": compressor.compress(data.queries).flat}, place)
    if name in ("energy", "rank"):
        for layer in compressor.layers:
            for key, x in expected(f"{place}/{layer}").items():
                assert_equal(compressor.moments(layer)[key.removeprefix("moments.")], x)
        compressor.calibrate(data.more)
        for layer in compressor.layers:
            found = {f"moments.{side}": x for side, x in compressor.moments(layer).items()}
            compare(found, f"{place}/more/{layer}")


@pytest.mark.parametrize("name", ["plain", "dense"])
def test_a_sketch_draws_the_masks_that_it_drew(name, data):
    """Without calibration: from the seed alone."""
    assert data.compressor(made.SKETCHES[name]).digest() == PLAIN[f"masks-{name}"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command of `dropinf` and return what it printed."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dropinf", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        assert caught.value.code in (0, None), printed.err
        return printed.out

    return run


def same_answer(found: dict, wanted: dict) -> None:
    """The same JSON, with scores to rounding."""
    assert json.loads(json.dumps(found), parse_float=lambda _: 0.0) == json.loads(
        json.dumps(wanted), parse_float=lambda _: 0.0
    )
    assert scores_of(found) == pytest.approx(scores_of(wanted), rel=1e-4)


def scores_of(answer: object) -> list[float]:
    if isinstance(answer, float):
        return [answer]
    if isinstance(answer, dict):
        answer = [answer[key] for key in sorted(answer)]
    parts = answer if isinstance(answer, list) else ()
    return [score for part in parts for score in scores_of(part)]


def test_an_index_of_the_command_line_answers_as_before(command, monkeypatch):
    pytest.importorskip("transformers")
    assert_rows(dropinf.Index.open(FIXTURES / "text"), "text")
    monkeypatch.chdir(FIXTURES)
    asked = [x for text in made.TEXT_QUERIES for x in ("--text", text)]
    for kind in ("influence", "cosine"):
        found = command("query", "text", *asked, "--model", "text-model", "--top", 4, "--kind", kind, "--json")
        same_answer(json.loads(found), PLAIN[f"text {kind}"])
    same_answer(json.loads(command("self-influence", "text", "--json")), PLAIN["text self-influence"])
    assert json.loads(command("info", "text", "--json"))["about"] == PLAIN["text"]["info"]["about"]


def test_an_index_of_the_command_line_goes_on(command, copy, tmp_path):
    """The same commands change nothing, though the model is elsewhere; other passages are added after those there."""
    pytest.importorskip("transformers")
    folder, model = copy("text"), copy("text-model")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    third = {"another": "two dogs sat on a cat"}
    for number, passages in enumerate((made.PASSAGES, made.LATER, third)):
        data = tmp_path / f"{number}.jsonl"
        made.write_passages(data, passages)
        options = ("--model", model, "--data", data, *made.TEXT_OPTIONS, *(("--append",) if number else ()))
        command("index", *options, "--out", folder)
        if number < 2:
            assert_rows(dropinf.Index.open(folder), "text")
            kept = {path: x for path, x in files.items() if path.name not in ("manifest.json", "fisher.safetensors")}
            assert all(path.read_bytes() == content for path, content in kept.items())
    after = dropinf.Index.open(folder)
    assert after.verify() == []
    assert after.ids() == [*PLAIN["text"]["ids"], "another"]
    assert_equal(after[:-1].flat, TENSORS["text/rows"])
    texts = [json.loads(line)["text"] for line in (folder / "passages.jsonl").read_text().splitlines()]
    assert texts == [*made.PASSAGES.values(), *made.LATER.values(), *third.values()]
    before = after[:].flat, after.ids()
    command("compact", folder)
    after = dropinf.Index.open(folder)
    assert (after.info()["shards"], after.verify(), after.ids()) == (1, [], before[1])
    assert torch.equal(after[:].flat, before[0])
    command("index", *options, "--out", folder)  # the call that was merged
    assert dropinf.Index.open(folder).manifest.runs == after.manifest.runs
