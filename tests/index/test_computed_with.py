"""What a loss and a model compute with, beside their weights; and what an index's own files are kept from."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import dropinf
from dropinf.files import checksum
from dropinf.index.manifest import _canonical
from dropinf.loss_name import is_same_loss, name_of_loss
from tests.index.small import loss_fn, make_batches, make_compressor, make_model

SCALE, WEIGHTS, CALLS = 1.0, [1.0, 1.0], 0


def read_globally(model, batch):
    return SCALE * loss_fn(model, batch)


def read_by_a_helper(model, batch):
    return helper(model, batch)


def helper(model, batch):
    return (lambda x: SCALE * x)(loss_fn(model, batch))


def read_from_a_list(model, batch):
    return WEIGHTS[0] * loss_fn(model, batch)


def counting(model, batch):
    global CALLS
    CALLS += 1
    return loss_fn(model, batch)


def with_array(factor):
    held = np.array([factor, 1.0])
    return lambda model, batch: float(held[0]) * loss_fn(model, batch)


def with_list(factor):
    held = [factor, 1.0]
    return lambda model, batch: held[0] * loss_fn(model, batch)


class Criterion(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, model, batch):
        return self.factor * loss_fn(model, batch)


@pytest.mark.parametrize("loss", [read_globally, read_by_a_helper])
def test_a_loss_is_known_by_the_globals_that_it_reads(loss, monkeypatch):
    before = name_of_loss(loss)
    assert name_of_loss(loss) == before
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert not is_same_loss(before, name_of_loss(loss))


def test_a_loss_is_known_by_its_lists_and_not_by_its_counts(monkeypatch):
    before = name_of_loss(read_from_a_list), name_of_loss(counting)
    monkeypatch.setitem(globals(), "WEIGHTS", [2.0, 1.0])
    monkeypatch.setitem(globals(), "CALLS", 7)
    assert [is_same_loss(a, name_of_loss(b)) for a, b in zip(before, (read_from_a_list, counting), strict=True)] == [
        False,
        True,
    ]


@pytest.mark.parametrize("make", [with_array, with_list, Criterion, lambda f: Criterion(f).forward])
def test_a_loss_is_known_by_what_it_holds(make):
    assert is_same_loss(name_of_loss(make(1.0)), name_of_loss(make(1.0)))
    assert not is_same_loss(name_of_loss(make(1.0)), name_of_loss(make(2.0)))


def test_where_a_loss_is_defined_says_nothing():
    now = name_of_loss(read_globally)
    moved = now.replace("tests.index.test_computed_with.read_globally", "__main__.read_globally")
    assert moved != now
    assert is_same_loss(moved, now)


def test_losses_of_earlier_versions_are_compared_as_far_as_they_tell():
    plain, _, does = name_of_loss(with_list(1.0)).partition(", does ")
    assert does
    for before in ("", plain, *(f"{plain}, {word} 3.11:01234567" for word in ("holding", "with", "binds"))):
        assert is_same_loss(before, name_of_loss(with_list(2.0)))
    other_python = f"{plain}, does 2.7:01234567"
    assert is_same_loss(other_python, name_of_loss(with_list(2.0)))
    assert not is_same_loss(name_of_loss(read_globally).partition(",")[0], name_of_loss(with_list(2.0)))


def test_an_append_of_a_loss_that_reads_another_number_is_refused(tmp_path, monkeypatch):
    compressor = dropinf.Compressor(make_model(), dropinf.Dropout(6), read_globally)
    compressor.compress(make_batches(), out=tmp_path / "idx")
    monkeypatch.setitem(globals(), "SCALE", 7.0)
    with pytest.raises(ValueError, match="rows of two losses do not belong in one index"):
        compressor.compress(make_batches(3, 5), out=tmp_path / "idx", append=True)


def hooked(model):
    model[0].register_forward_hook(lambda _, args, out: out * 0.5)


def trained(model):
    model[1].train()


def configured(model):
    model[0].config = {"size": [1, 2]}


@pytest.mark.parametrize("change", [hooked, trained, configured])
def test_a_model_whose_hooks_modes_or_containers_changed_is_warned_of(change, tmp_path):
    make_compressor().compress(make_batches(), out=tmp_path / "idx")
    model = make_model().eval()
    change(model)
    others = (
        contextlib.nullcontext() if change is trained else pytest.raises(ValueError, match="it is not the one that")
    )
    with pytest.warns(UserWarning, match="its other attributes are not those"), others:
        dropinf.Compressor(model, dropinf.Dropout(6), loss_fn).compress(
            make_batches(3, 5), out=tmp_path / "idx", append=True
        )


@pytest.mark.parametrize("append", [False, True])
def test_ids_that_count_are_refused(append, tmp_path):
    if append:
        make_compressor().compress(
            make_batches(), out=tmp_path / "idx", ids=lambda b: [f"a{i}" for i in range(len(b[0]))]
        )
    numbers = itertools.count()
    with pytest.raises(ValueError, match="names must come from the batch alone"):
        make_compressor().compress(
            make_batches(3, 5), out=tmp_path / "idx", ids=lambda b: [str(next(numbers)) for _ in b[0]], append=append
        )


def edited(folder, change):
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    body.pop("checksum")
    change(body)
    path.write_bytes(_canonical({**body, "checksum": checksum(_canonical(body))}))


EDITS = {
    "layers_in_another_order": lambda body: body["layers"].reverse(),
    "half_of_the_shards": lambda body: body["runs"][0]["shards"].pop(),
    "no_ids": lambda body: body.update(ids=False),
    "another_model": lambda body: body.update(model="0" * 32),
    "shards_of_another_size": lambda body: body["runs"][0].update(shard_batches=5),
}


@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_a_manifest_that_was_edited_is_not_sound(name, appended, tmp_path):
    ids = lambda batch: [f"{float(x.sum())}" for x in batch[0]]  # noqa: E731
    make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=ids)
    if appended:
        make_compressor().compress(make_batches(3, 5), out=tmp_path / "idx", ids=ids, append=True)
    assert dropinf.Index(tmp_path / "idx").verify() == []
    edited(tmp_path / "idx", EDITS[name])
    assert dropinf.Index(tmp_path / "idx").verify()


def test_runs_behind_merged_ones_are_sound(tmp_path):
    for i in range(4):
        index = make_compressor().compress(make_batches(2, i), out=tmp_path / "idx", append=i > 0)
        if i == 2:
            index.compact()
    assert index.verify() == []
    edited(tmp_path / "idx", lambda body: body["runs"][-1].update(shard_batches=5))
    assert dropinf.Index(tmp_path / "idx").verify()


@pytest.mark.parametrize("name", ["sketch.safetensors", "fisher.safetensors", "shards/rows.npy"])
def test_an_export_does_not_take_the_place_of_an_index_s_own_files(name, tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher="diagonal")
    with pytest.raises(ValueError, match="a file of the index itself"):
        index.whitened(tmp_path / "idx" / name)
    assert index.verify() == []


def test_nothing_is_made_where_an_index_was(tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx")
    fisher = dropinf.build_fisher(index)
    shutil.move(tmp_path / "idx", tmp_path / "moved")
    for change in (index.compact, index.discard, lambda: index.save_fisher(fisher)):
        with pytest.raises(FileNotFoundError, match="no longer there"):
            change()
    assert not (tmp_path / "idx").exists()


@pytest.mark.parametrize("out", [b"idx", 5, "a\0b"])
def test_an_out_that_is_no_path(out):
    with pytest.raises(TypeError, match="it must be the path of a folder"):
        make_compressor().compress(make_batches(), out=out)


@pytest.mark.parametrize("order", ["abc", {1: 2}, [10**30], [None] * 9])
def test_an_order_that_is_none(order, tmp_path):
    with pytest.raises(TypeError, match="it must be whole numbers, one for each sample"):
        make_compressor().compress(make_batches(), out=tmp_path / "idx", order=order)


CODE = """
import functools
import torch.nn as nn

def loss(model, batch):
    return {a} * model(batch).square().sum(1)

def scaled(f):
    @functools.wraps(f)
    def inner(model, batch):
        return f(model, batch) * {b}
    return inner

class Base:
    rate = {c}
    def __call__(self, model, batch):
        return self.helper(model, batch)
    def helper(self, model, batch):
        return {d} * loss(model, batch)
    @property
    def factor(self):
        return {e}

class Own(Base):
    def bound(self, model, batch):
        return self.rate * self.factor * self.helper(model, batch)

class Criterion(nn.Module):
    def forward(self, model, batch):
        return GLOBAL * loss(model, batch)

GLOBAL = {f}
"""
MADE = {
    "function": (lambda found: found["loss"], "a"),
    "decorated": (lambda found: found["scaled"](found["loss"]), "ab"),
    "instance": (lambda found: found["Own"](), "ad"),
    "method": (lambda found: found["Own"]().bound, "acde"),
    "criterion": (lambda found: found["Criterion"](), "af"),
}


def defined(**numbers):
    """What a console that runs the code would hold: there is no source to read."""
    found = {"__name__": "typed"}
    exec(CODE.format(**dict.fromkeys("abcdef", 1.5) | numbers), found)
    return found


@pytest.mark.parametrize("kind", MADE)
def test_a_loss_is_known_by_what_its_code_does_wherever_that_stands(kind):
    get, reads = MADE[kind]
    before = name_of_loss(get(defined()))
    assert is_same_loss(before, name_of_loss(get(defined())))
    changed = {x for x in "abcdef" if not is_same_loss(before, name_of_loss(get(defined(**{x: 2.5}))))}
    assert changed == set(reads)


def test_comments_and_layout_of_a_loss_say_nothing(tmp_path, monkeypatch):
    texts = ("def loss(m, x):\n    return m(x)\n", "# why\ndef loss(m, x):\n    # so\n    return m(\n        x)\n")
    names = []
    for i, text in enumerate((*texts, "def loss(m, x):\n    return -m(x)\n")):
        (tmp_path / f"comments_{i}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        names.append(name_of_loss(__import__(f"comments_{i}").loss))
    assert is_same_loss(names[0], names[1])
    assert not is_same_loss(names[0], names[2])


def test_the_order_of_sets_says_nothing():
    """Which differs from process to process."""
    one, other = ({"a", "bb", "ccc"}, {"ccc", "bb", "a"})
    names = [name_of_loss(functools.partial(loss_fn, extra=x)) for x in (one, frozenset(other))]
    assert is_same_loss(*names)
