"""The first batch of an index is kept: what a later loss or model makes of it must be the rows that are there."""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf.files import checksum, file_checksum
from dropinf.index import probe
from dropinf.index.discard import settle_passages
from dropinf.index.fingerprint import fingerprint
from dropinf.index.folder import PASSAGES, SKETCH
from dropinf.index.manifest import VERSION, Manifest
from tests.index.small import make_batches, make_model
from tests.index.test_runs import StopError, interrupted

LONG = [2.0] * 5000


def plain(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


# Losses that read what no comparison of code looks into, and how it is changed.
UNSEEN = {
    "long list": (lambda m, b: plain(m, b) * LONG[7], "LONG", [3.0] * 5000),
}


def compressor(loss_fn=plain, model=None):
    return dropinf.Compressor(model or make_model(), dropinf.Dropout(3), loss_fn)


@pytest.mark.parametrize("what", UNSEEN)
def test_what_no_comparison_of_code_sees_shows_in_the_first_batch(what, tmp_path, monkeypatch):
    loss_fn, name, other = UNSEEN[what]
    index = compressor(loss_fn).compress(make_batches(), out=tmp_path / "idx")
    more = make_batches(2, 5)
    compressor(loss_fn).compress(more, out=tmp_path / "idx", append=True)
    dropinf.Compressor.from_index(index, make_model(), loss_fn).compress(more)
    monkeypatch.setitem(globals(), name, other)
    with pytest.raises(ValueError, match=r"of the first batch of .*idx, which it keeps, they now give others"):
        compressor(loss_fn).compress(make_batches(2, 7), out=tmp_path / "idx", append=True)
    queries = dropinf.Compressor.from_index(index, make_model(), loss_fn)
    with pytest.raises(ValueError, match=r"of the first batch of .*idx, which it keeps, they now give others"):
        queries.compress(iter(more))
    assert len(dropinf.Index.open(tmp_path / "idx")) == len(index) + sum(len(b[0]) for b in more)


def test_queries_may_have_another_loss(tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")

    def margin(model, batch):
        return model(batch[0])[:, 0]

    dropinf.Compressor.from_index(index, make_model(), margin).compress(make_batches(1, 5))


class Attributes(nn.Module):
    def __init__(self, functions):
        super().__init__()
        self.l, self.functions = nn.Linear(12, 4), functions

    def forward(self, x):
        return self.functions[0](self.l(x))


def test_a_model_whose_list_of_functions_is_another_is_seen(tmp_path):
    def model(f):
        torch.manual_seed(0)
        return Attributes([f]).double()

    batches = make_batches()
    compressor(model=model(torch.tanh)).compress(batches, out=tmp_path / "idx")
    with pytest.raises(ValueError, match=r"it is not the one that .*settings of modules are others"):
        compressor(model=model(torch.sigmoid)).compress(make_batches(2, 5), out=tmp_path / "idx", append=True)


def test_a_loss_that_draws_numbers_is_compared_with_nothing(tmp_path):
    def noisy(model, batch):
        return plain(model, batch) * torch.rand(())

    made = dropinf.Compressor(make_model(), dropinf.Dropout(3), noisy, audit="never")
    made.compress(make_batches(), out=tmp_path / "idx")
    assert made.compress(make_batches(2, 5), out=tmp_path / "idx", append=True).verify() == []


def test_a_first_batch_that_is_damaged_or_lost_is_named(tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    path = tmp_path / "idx" / "first_batch.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert any("first_batch.safetensors: damaged" in problem for problem in index.verify())
    for damage in (lambda: None, path.unlink):
        damage()
        with pytest.raises(ValueError, match=r"first_batch\.safetensors: missing, or damaged"):
            compressor().compress(make_batches(2, 5), out=tmp_path / "idx", append=True)
    assert compressor().compress(make_batches(), out=tmp_path / "idx").verify() == []  # which writes it again
    assert compressor().compress(make_batches(2, 5), out=tmp_path / "idx", append=True).verify() == []


@dataclasses.dataclass(frozen=True)
class Fields:
    x: torch.Tensor
    y: list[int]


class Named(NamedTuple):
    x: Any
    y: Any


def arrays(x, y):
    return {"x": x.numpy(), "y": y.numpy()}


BATCHES = {
    "a tuple": lambda x, y: (x, y),
    "a mapping": lambda x, y: {"x": x, "y": y, "about": {"name": "é", "n": [1, 2.5, None, True]}},
    "its user's mapping": lambda x, y: collections.UserDict({"x": x, "y": y}),
    "arrays": arrays,
    "a dataclass": lambda x, y: Fields(x, y.tolist()),
    "a named tuple": lambda x, y: Named(x, y),
    "pairs": lambda x, y: [(a, int(b)) for a, b in zip(x, y, strict=True)],
    "text": lambda x, y: [{"text": " ".join(map(str, row.tolist())), "y": int(b)} for row, b in zip(x, y, strict=True)],
    "16 bits": lambda x, y: (x.bfloat16(), y.to(torch.int32), torch.tensor(2.0).half()),
    "nothing": lambda x, y: (x, y, [], {}, None),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_comes_back_in_the_containers_of_another(kind, tmp_path):
    (x, y), (x2, y2) = make_batches(2, 3)
    batch, like = BATCHES[kind](x, y), BATCHES[kind](x2[:2], y2[:2])
    data = probe.freeze(batch)
    assert data is not None
    again = probe.thaw(data, like, tmp_path)
    assert type(again) is type(batch)
    assert fingerprint(again) == fingerprint(batch)
    assert fingerprint(like) == fingerprint(BATCHES[kind](x2[:2], y2[:2]))  # untouched


def test_what_has_no_other_form_is_not_kept(tmp_path):
    def ids(batch):
        return [f"{int(n)}" for n in batch[2].numbers]

    for i, extra in enumerate((SimpleNamespace(numbers=torch.arange(4)), torch.eye(4).to_sparse(), {1.5: 2}, {1, 2})):
        assert probe.freeze((torch.zeros(2), extra)) is None
        if not i:
            batches = [(x[:4], y[:4], extra) for x, y in make_batches()[:1]]
            compressor().compress(batches, out=tmp_path / "idx", ids=ids)
            assert not (tmp_path / "idx" / "first_batch.safetensors").exists()
    assert probe.freeze(torch.zeros(probe.LARGEST // 4 + 1)) is None
    assert probe.freeze(torch.zeros(4, device="meta")) is None
    assert probe.freeze(np.array(["a"])) is None


def test_batches_of_another_form_are_compared_with_nothing(tmp_path):
    def either(model, batch):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        return plain(model, (x, y))

    compressor(either).compress(make_batches(), out=tmp_path / "idx")
    more = [{"x": x, "y": y} for x, y in make_batches(2, 5)]
    assert compressor(either).compress(more, out=tmp_path / "idx", append=True).verify() == []


def halves(model, batch):
    return plain(model, batch) * (1.0 + (batch[1] == 3))


def test_the_manifest_says_who_made_all_rows_after_another_went_on(tmp_path):
    """Two losses that agree on all that is finished: what goes on makes the rest, and is what is compared from then on."""
    batches = [(x, y.clamp(max=2)) for x, y in make_batches(3)] + make_batches(3, 9)
    with pytest.raises(StopError):
        compressor().compress(interrupted(batches, 3), out=tmp_path / "idx")
    with pytest.warns(UserWarning, match="rows of two losses do not belong in one index"):
        index = compressor(halves).compress(batches, out=tmp_path / "idx")
    assert index.verify() == []
    assert index.origin is not None
    assert index.origin.loss == compressor(halves).loss_name()
    assert compressor(halves).compress(batches, out=tmp_path / "idx").verify() == []
    with pytest.raises(ValueError, match="rows of two losses"):
        compressor().compress(make_batches(2, 5), out=tmp_path / "idx", append=True)
    assert compressor(halves).compress(make_batches(2, 5), out=tmp_path / "idx", append=True).verify() == []


def test_an_append_that_is_not_finished_is_not_gone_on_with_by_another_loss(tmp_path):
    compressor().compress(make_batches(), out=tmp_path / "idx")
    more = make_batches(4, 5)
    with pytest.raises(StopError):
        compressor().compress(interrupted(more, 2), out=tmp_path / "idx", append=True)
    before = file_checksum(tmp_path / "idx" / "manifest.json")
    with pytest.raises(ValueError, match="append with the function of then"):
        compressor(lambda m, b: 2 * plain(m, b)).compress(more, out=tmp_path / "idx", append=True)
    assert file_checksum(tmp_path / "idx" / "manifest.json") == before
    assert Manifest.load(tmp_path / "idx").unfinished
    assert compressor().compress(more, out=tmp_path / "idx", append=True).verify() == []


class Annealed:
    factor = 1.0

    def __init__(self):
        self.scale, self.calls = 1.0, 0

    def __call__(self, model, batch):
        self.calls += 1
        return self.scale * plain(model, batch)


def swap_data(model, b):
    if b == 2:
        model[0].weight.data = model[0].weight.data * 2


def test_weights_that_are_replaced_while_an_index_is_written_are_an_error(tmp_path):
    model = make_model()

    def batches():
        for b, batch in enumerate(make_batches()):
            swap_data(model, b)
            yield batch

    with pytest.raises(ValueError, match="model: its weights changed"):
        compressor(model=model).compress(batches(), out=tmp_path / "idx")
    assert Manifest.load(tmp_path / "idx").unfinished


def test_a_loss_that_counts_its_calls_is_one_loss(tmp_path):
    loss = Annealed()
    compressor(loss).compress(make_batches(), out=tmp_path / "idx")
    assert compressor(Annealed()).compress(make_batches(2, 5), out=tmp_path / "idx", append=True).verify() == []
    assert loss.calls > 1


def lines(count: int) -> bytes:
    return b"".join(b'{"id": "%d", "text": ""}\n' % i for i in range(count))


@pytest.mark.parametrize("named", [False, True])
def test_passages_of_an_append_that_never_began_are_taken_out(named, tmp_path):
    """Killed before the manifest named them, or right behind that."""
    folder = tmp_path / "idx"
    index = compressor().compress(make_batches(), out=folder)
    known, more = lines(len(index)), lines(len(index) + 3)
    (folder / PASSAGES).write_bytes(known)
    manifest = Manifest.load(folder).with_file(PASSAGES, checksum(known))
    manifest.save(folder)
    assert dropinf.Index.open(folder).verify() == []
    (folder / PASSAGES).write_bytes(more)
    if named:
        manifest.with_file(PASSAGES, checksum(more)).save(folder)
    (problem,) = dropinf.Index.open(folder).verify()
    assert "it has passages of an append that ended before its first row was made" in problem
    left = settle_passages(folder, Manifest.load(folder))
    assert left == manifest
    assert (folder / PASSAGES).read_bytes() == known
    assert dropinf.Index.open(folder).verify() == []
    (folder / PASSAGES).write_bytes(b"!" + more[1:])  # damaged, and left alone
    assert settle_passages(folder, left) == left
    assert "damaged" in dropinf.Index.open(folder).verify()[0]


def test_a_fisher_matrix_of_other_weights_is_not_kept(tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    rows = compressor(model=make_model(1)).compress(make_batches())
    for fisher in (dropinf.build_fisher(rows), dropinf.Fisher("block").merge(dropinf.build_fisher(rows))):
        fisher.save(tmp_path / "fisher.safetensors")
        for given in (fisher, dropinf.Fisher.load(tmp_path / "fisher.safetensors")):
            with pytest.raises(ValueError, match=r"fisher and .*idx are of different models: the weights"):
                index.save_fisher(given)
    index.save_fisher(dropinf.build_fisher(compressor().compress(make_batches())))
    assert index.fisher().origins == (tuple(index.origin),)


def test_an_index_of_before_has_no_first_batch(tmp_path):
    folder = tmp_path / "idx"
    index = compressor().compress(make_batches(), out=folder)
    manifest = Manifest.load(folder)
    body = json.loads(manifest.to_bytes()) | {"version": 2, "files": {"sketch.safetensors": manifest.files[SKETCH]}}
    del body["checksum"]
    text = json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"
    whole = json.dumps(body | {"checksum": checksum(text)}, indent=1, sort_keys=True).encode() + b"\n"
    (folder / "manifest.json").write_bytes(whole)
    (folder / "first_batch.safetensors").unlink()
    before = dropinf.Index.open(folder)
    assert before.verify() == []
    assert torch.equal(before[:].flat, index[:].flat)
    more = make_batches(2, 5)
    after = compressor().compress(more, out=folder, append=True)
    assert after.verify() == []
    assert len(after) == len(before) + sum(len(b[0]) for b in more)
    assert json.loads((folder / "manifest.json").read_text())["version"] == VERSION
