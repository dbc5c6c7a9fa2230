"""Indexes of few bits a row: written, resumed, appended to, compared, scored, made of others and read by FAISS."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dropinf
from dropinf.files import checksum
from dropinf.index import requantize as requantizing
from tests.index.small import files, loss_fn, make_batches, make_compressor, make_model, names

README = Path(__file__).parents[2] / "README.md"
faiss.omp_set_num_threads(1)
ROW_BYTES = {1: 14, 2: 24, 4: 45}


@pytest.fixture(scope="module", params=[1, 2, 4])
def code(request, train):
    return dropinf.BitCode.fit(train, bits=request.param)


@pytest.fixture(scope="module")
def few(code, tmp_path_factory):
    return make_compressor().compress(
        make_batches(), out=tmp_path_factory.mktemp("index") / "idx", ids=names, dtype=code
    )


def decoded(code, gradients):
    """What codes and a scale of two bytes are worth, decoded by numpy."""
    rows = code.rows(gradients).flat.double().numpy()
    step, half = {1: 1.0, 2: 0.9957, 4: 0.3352}[code.bits], 2 ** (code.bits - 1)
    z = rows / np.sqrt((rows**2).mean(1, keepdims=True))
    values = np.clip(np.floor(z / step) + half, 0, 2 * half - 1) - (2 * half - 1) / 2
    scale = (rows**2).sum(1) / (values * rows).sum(1)
    return values * torch.from_numpy(scale).bfloat16().double().numpy()[:, None]


def test_rows_are_codes_of_what_the_compressor_makes(few, code, train):
    assert few.bytes_per_sample == code.bytes_per_sample == code.width * code.bits // 8 + 2
    np.testing.assert_allclose(few[:].flat.numpy(), decoded(code, train), rtol=1e-6)
    assert few.verify() == []
    assert few.ids() == [name for batch in make_batches() for name in names(batch)]
    info = few.info()
    assert (info["dtype"], info["bytes_per_sample"]) == (f"{code.bits}bit", code.bytes_per_sample)
    assert few.code.digest == code.digest
    assert dropinf.Index.open(few.path).manifest.to_bytes().find(b'"version": 4') > 0


def test_scores_are_products_with_the_rows(few, code, train, query, tmp_path):
    expected = code.queries(query).flat.numpy() @ decoded(code, train).T
    found = dropinf.score(query, few)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    for largest in (True, False):
        best = dropinf.score(query, few, top=7, largest=largest)
        values, indices = found.sort(dim=1, descending=largest, stable=True)
        assert torch.equal(best.indices, indices[:, :7])
        torch.testing.assert_close(best.values, values[:, :7])
    torch.testing.assert_close(dropinf.score(query, few, reduce="mean"), found.mean(0))
    torch.testing.assert_close(dropinf.score(query, few, out=tmp_path / "all.npy"), found)
    one = dropinf.score(query[:1].to(torch.float32), few)
    size = float(code.queries(query[:1]).flat.norm()) * float(np.linalg.norm(decoded(code, train), axis=1).max())
    torch.testing.assert_close(one[0].double(), found[0].double(), rtol=0, atol=3e-5 * size)
    by = dropinf.score(query, few, by="source", sources=[i % 3 for i in range(len(train))])
    torch.testing.assert_close(by[1], found[:, 1::3].sum(1))


def test_an_interrupted_call_goes_on_to_the_same_bytes(few, code, tmp_path):
    compressor, batches = make_compressor(), make_batches()

    def breaking():
        yield from batches[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressor.compress(breaking(), out=tmp_path / "idx", ids=names, dtype=code)
    compressor.compress(batches, out=tmp_path / "idx", ids=names, dtype=code)
    found, expected = files(tmp_path / "idx"), files(few.path)
    assert {n: x for n, x in found.items() if n != "manifest.json"}.keys() >= {"code.safetensors"}
    assert torch.equal(dropinf.Index.open(tmp_path / "idx")[:].flat, few[:].flat)
    assert found["code.safetensors"] == expected["code.safetensors"]


def test_an_append_takes_the_code_of_the_index(few, code, train, tmp_path):
    shutil.copytree(few.path, tmp_path / "idx")
    more = make_batches(3, 77)
    grown = make_compressor().compress(more, out=tmp_path / "idx", ids=names, append=True)
    assert len(grown) == len(train) + sum(len(batch[0]) for batch in more)
    assert grown.verify() == []
    np.testing.assert_allclose(
        grown[len(train) :].flat.numpy(), decoded(code, make_compressor().compress(more)), rtol=1e-6
    )
    again = make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=names)
    assert len(again) == len(grown)


def smoothed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.1)


def twice(model, batch):
    return 1.1 * F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Shifted(torch.nn.Module):
    """The model of small.py with something in its forward that no comparison of code knows."""

    by = 0.0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + self.by * x[:, :4]


@pytest.mark.parametrize("loss", [smoothed, twice])
def test_rows_of_another_loss_are_no_rows_of_the_first_batch(few, code, loss, monkeypatch):
    """Even where its name says nothing: what the first batch gives does."""
    compressor = make_compressor()
    compressor.loss_fn = compressor._sweep.loss_fn = loss
    monkeypatch.setattr(type(compressor), "loss_name", lambda _: few.manifest.made_by[1])
    with pytest.raises(ValueError, match=r"of the first batch of .*they now give others"):
        compressor.compress(make_batches(3, 77), out=few.path, ids=names, append=True)


def test_a_query_is_compared_with_the_first_batch_of_the_index(few, query):
    compressor = dropinf.Compressor.from_index(few.path, make_model(), loss_fn)
    found = compressor.compress(make_batches(2, 9))
    assert torch.equal(found.flat, query.flat)
    with pytest.raises(ValueError, match="weights"):
        dropinf.Compressor.from_index(few.path, make_model(5), loss_fn)


def test_what_does_not_belong_together_is_refused(few, code, train, query, tmp_path):
    compressor, batches = make_compressor(), make_batches()
    other = dropinf.BitCode.fit(train, "block", bits=code.bits, seed=8)
    floats = compressor.compress(batches, out=tmp_path / "floats")
    elsewhere = make_compressor(5)
    doubled = dropinf.Compressor(make_model(), dropinf.Dropout(6), twice)
    theirs = dropinf.BitCode.fit(doubled.compress(batches), bits=code.bits)
    for call, message in (
        (lambda: compressor.compress(batches, out=few.path, ids=names, dtype=other), "holds rows of another code"),
        (
            lambda: compressor.compress(batches, out=few.path, ids=names, dtype=torch.int8),
            "dtype is torch.int8; .* holds",
        ),
        (lambda: compressor.compress(batches, out=floats.path, dtype=code), "dtype is '.bit'; .* holds float64"),
        (lambda: elsewhere.compress(batches, out=tmp_path / "new", dtype=code), "code and compressor are of different"),
        (
            lambda: doubled.compress(batches, out=tmp_path / "new", dtype=code),
            "code and compressor are of different losses",
        ),
        (lambda: floats.requantize(tmp_path / "other", theirs), "code and index are of different losses"),
        (lambda: floats.requantize(floats.path / "new", code), "in the folder of the index itself"),
        (lambda: dropinf.score(query, few, out=few.path / "sketch.safetensors"), "a file of the index itself"),
        (lambda: dropinf.score(query, floats, kind="dot", out=floats.path / "manifest.json"), "a file of the index"),
        (lambda: compressor.compress(batches, out=tmp_path / "new", dtype="1bit"), "'1bit', which needs to know what"),
        (lambda: compressor.compress(batches, out=tmp_path / "new", dtype="3bit"), "dtype is 3bit; it must be one of"),
        (lambda: compressor.compress(batches, out=tmp_path / "new", dtype=code, fisher="block"), "leave fisher out"),
        (lambda: dropinf.score(query, few, dropinf.build_fisher(train)), "leave it out"),
        (lambda: dropinf.score(query, few, kind="dot"), "kind is 'dot'; rows of few bits have kind='influence' alone"),
        (lambda: dropinf.score(query, few, by="layer"), "by is 'layer'; rows of few bits are turned over all layers"),
        (lambda: dropinf.score(elsewhere.compress(batches), few), "query and train are of different models"),
        (lambda: dropinf.score(make_compressor(seed=0, group=2).compress(batches), few), "different masks"),
        (lambda: dropinf.self_influence(few, dropinf.build_fisher(train)), "have no self-influence"),
        (lambda: few.save_fisher(dropinf.build_fisher(few)), "have their Fisher matrix in their code"),
        (lambda: few.requantize(tmp_path / "again", code), "few bits already"),
        (lambda: dropinf.choose(make_model(), batches, loss_fn, budget_bytes=2, bits=1), "budget_bytes is 2; a row"),
        (lambda: floats.requantize(few.path, code), "which is there; name a new folder"),
        (lambda: few.whitened(tmp_path / "x.npy", dropinf.build_fisher(train)), "leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").glob("*.json"))
    assert dropinf.score(elsewhere.compress(batches[:1]), few, other_model=True).shape == (5, len(train))


def test_a_damaged_code_is_found_and_made_again(few, code, query, tmp_path):
    shutil.copytree(few.path, tmp_path / "idx")
    path = tmp_path / "idx" / "code.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    index = dropinf.Index.open(tmp_path / "idx")
    assert index.verify() == [f"{path}: damaged, its bytes do not match their checksum"]
    with pytest.raises(ValueError, match=r"code\.safetensors: missing, or damaged"):
        dropinf.score(query, index)
    path.unlink()
    with pytest.raises(ValueError, match=r"code\.safetensors: missing, or damaged"):
        dropinf.score(query, dropinf.Index.open(tmp_path / "idx"))
    made = make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=names, dtype=code)
    assert made.verify() == []


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.int8])
def test_an_index_of_floats_becomes_one_of_few_bits(dtype, code, query, tmp_path):
    compressor, more = make_compressor(), make_batches(3, 77)
    index = compressor.compress(make_batches(), out=tmp_path / "idx", ids=names, dtype=dtype, order=range(53, -1, -1))
    index = compressor.compress(more, out=tmp_path / "idx", ids=names, append=True)
    before = files(index.path)
    made = index.requantize(tmp_path / "few", code)
    assert files(index.path) == before
    assert made.verify() == []
    assert made.ids() == index.ids()
    assert len(list((tmp_path / "few" / "shards").iterdir())) == 1
    if dtype is None:
        np.testing.assert_allclose(made[:].flat.numpy(), decoded(code, index[:]), rtol=1e-6)
    assert dropinf.score(query, made).shape == (len(query), len(index))
    grown = make_compressor().compress(make_batches(2, 78), out=made.path, ids=names, append=True)
    assert grown.verify() == []
    asked = dropinf.Compressor.from_index(made.path, make_model(), loss_fn).compress(make_batches(2, 9))
    assert torch.equal(asked.flat, query.flat)


def test_a_requantization_that_fails_leaves_nothing(code, tmp_path, monkeypatch):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(requantizing, "compact", fail)
    with pytest.raises(KeyboardInterrupt):
        index.requantize(tmp_path / "few", code)
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]
    monkeypatch.undo()
    left, written = tmp_path / ".few.0123.tmp", tmp_path / ".few.4567.tmp"  # by a killed call, and by another one
    for folder in (left, written):
        (folder / "shards").mkdir(parents=True)
    held = requantizing._hold(written)
    index.requantize(tmp_path / "few", code)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".few.4567.tmp", "few", "idx"]
    os.close(held)
    shutil.rmtree(written)
    shutil.rmtree(tmp_path / "few")
    shard = next((tmp_path / "idx" / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        index.requantize(tmp_path / "few", code)
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]


def test_a_file_of_faiss_has_the_same_scores(few, code, query, tmp_path):
    if code.bits > 1:
        with pytest.raises(ValueError, match=r"would choose other codes of . bits than these; pass a factory"):
            few.whitened(tmp_path / "rows.faiss")
        return
    few.whitened(tmp_path / "rows.faiss")
    found = faiss.read_index(str(tmp_path / "rows.faiss"))
    assert isinstance(faiss.downcast_index(found), faiss.IndexRaBitQ)
    values, places = found.search(code.queries(query).flat.float().numpy(), 5)
    best = dropinf.score(query, few, top=5)
    np.testing.assert_allclose(values, best.values, rtol=1e-4)
    assert (places == best.indices.numpy()).mean() > 0.95  # but for ties
    few.whitened(tmp_path / "rows.npy")
    rows = torch.from_numpy(np.load(tmp_path / "rows.npy"))
    torch.testing.assert_close(code.queries(query).flat.float() @ rows.T, dropinf.score(query, few).float())


def test_a_manifest_says_what_rows_of_few_bits_need(few, tmp_path):
    shutil.copytree(few.path, tmp_path / "idx")
    path = tmp_path / "idx" / "manifest.json"
    whole = json.loads(path.read_text())
    for change in (
        {"dtype": "int8"},
        {"files": {name: x for name, x in whole["files"].items() if name != "code.safetensors"}},
        {"layers": [{**whole["layers"][0], "shape": [whole["layers"][0]["shape"][0] + 1]}]},
        {"layers": [*whole["layers"], {**whole["layers"][0], "name": "b"}]},
    ):
        body = {name: x for name, x in {**whole, **change}.items() if name != "checksum"}
        text = json.dumps(body, indent=1, sort_keys=True) + "\n"
        body["checksum"] = checksum(text.encode())
        path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
        with pytest.raises(ValueError, match="not a valid manifest"):
            dropinf.Index.open(tmp_path / "idx")


def test_the_snippet_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").partition("### A few hundred bytes a sample")[2]
    snippet = section.partition("```python\n")[2].partition("```")[0]
    batches = make_batches()
    make_compressor().compress(batches, out="idx")
    given = {"model": make_model(), "loss_fn": loss_fn, "some_batches": batches, "train_batches": batches}
    query = dropinf.choose(make_model(), batches, loss_fn, budget_bytes=256, bits=1)
    asked = dropinf.Compressor(make_model(), query.sketch, loss_fn)
    asked.calibrate(batches)
    names_ = {"dropinf": dropinf, "query": asked.compress(make_batches(1, 9)), **given}
    exec(snippet, names_)
    assert names_["best"].values.shape == (5, 54)
    assert names_["index"].bytes_per_sample == names_["code"].bytes_per_sample <= 256
    assert len(names_["few"]) == 54
