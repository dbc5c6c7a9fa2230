"""What is kept together, or scored together, is of one model, one loss and the same samples."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf.index.folder import SKETCH
from tests.index.small import make_batches, make_model

KINDS = ("block", "joint", "diagonal", "kronecker")


def plain(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def tripled(model, batch):
    return 3 * plain(model, batch)


def compressor(loss_fn=plain, model=None, **options):
    return dropinf.Compressor(model or make_model(), dropinf.Dropout(3), loss_fn, **options)


def relabelled(batches):
    return [(x, y.roll(1)) for x, y in batches]


def half_twice():
    rows = compressor().compress(make_batches())
    half = rows[: len(rows) // 2]
    return half, half


OTHERS = {
    "labels": lambda: [compressor().compress(relabelled(make_batches()))],
    "loss": lambda: [compressor(tripled).compress(make_batches())],
    "half twice": half_twice,
    "model": lambda: [compressor(model=make_model(1)).compress(make_batches())],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", OTHERS)
def test_a_fisher_matrix_of_other_gradients_is_not_kept(other, kind, tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    fisher = dropinf.Fisher(kind)
    for rows in OTHERS[other]():
        fisher.update(rows)
    with pytest.raises(ValueError, match=r"fisher: it is of|of different models"):
        index.save_fisher(fisher)
    assert index.manifest.files.keys() == dropinf.Index.open(tmp_path / "idx").manifest.files.keys()
    assert "fisher.safetensors" not in index.manifest.files


@pytest.mark.parametrize("size", [1e-18, 1, 1e18])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_a_fisher_matrix_of_its_gradients_is_kept(dtype, kind, size, tmp_path):
    """Whatever they are stored in: the matrix may be of what was there before."""

    def sized(model, batch):
        return size * plain(model, batch)

    if dtype == torch.float16 and size != 1:
        return  # it holds no such numbers
    rows = compressor(sized).compress(make_batches())
    index = compressor(sized).compress(make_batches(), out=tmp_path / "idx", dtype=dtype)
    for fisher in (dropinf.build_fisher(rows, kind), dropinf.build_fisher(index, kind)):
        index.save_fisher(fisher)
    assert dropinf.Index.open(tmp_path / "idx").fisher().count == len(index)


def test_a_fisher_matrix_of_another_model_is_not_used(tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    query, others = compressor().compress(make_batches(2)), compressor(model=make_model(1)).compress(make_batches())
    mixed = dropinf.build_fisher(index).update(others)
    for fisher in (dropinf.build_fisher(others), mixed):
        for kind in ("influence", "relative"):
            with pytest.raises(ValueError, match=r"fisher (is|and train are|and query are)|query and fisher are"):
                dropinf.score(query, index, fisher, kind=kind)
            dropinf.score(query, index, fisher, kind=kind, other_model=True)
        dropinf.score(query, index, fisher, kind="dot")  # which does not read it
        with pytest.raises(ValueError, match="of different models"):
            dropinf.self_influence(index, fisher)
        with pytest.raises(ValueError, match="of different models"):
            index.whitened(tmp_path / "white.npy", fisher)
    assert not (tmp_path / "white.npy").exists()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Linear(10, 5)
        self.temperature, self.name_or_path, self.gradient_checkpointing = 1.0, "here", False
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(10, dtype=torch.bool))
        self._scale, self.act, self.shift, self.factors, self.scaling = 1.0, torch.relu, torch.zeros(10), [1.0], {}
        self.config, self._seen, self.longest, self.scaling["default"] = SimpleNamespace(softcapping=30.0), 0, 0, 1.0

    def grow(self, size):
        self.longest = max(self.longest, size)

    def forward(self, x):
        self._seen += 1
        self.grow(len(x))
        h = self.act(self.norm(self.a(x)) + self.shift) * self.mask * self.factors[0] * self.scaling["default"]
        return torch.tanh(self.b(h) / self.config.softcapping) * self._scale / self.temperature


def doubled(module, args, out):
    return 2 * out


def trained_mode(m):
    m.train()
    m(torch.randn(8, 12))
    m.eval()


def softened(m):
    m.config.softcapping = 0.1


CHANGES = {
    "a private number": (lambda m: setattr(m, "_scale", 2.0), "settings of modules are others"),
    "a function": (lambda m: setattr(m, "act", torch.tanh), "settings of modules are others"),
    "a tensor": (lambda m: setattr(m, "shift", torch.ones(10)), "settings of modules are others"),
    "a list": (lambda m: m.factors.__setitem__(0, 3.0), "settings of modules are others"),
    "a dictionary": (lambda m: m.scaling.update(default=4.0), "settings of modules are others"),
    "a configuration": (softened, "settings of modules are others"),
    "a hook": (lambda m: m.a.register_forward_hook(doubled), "settings of modules are others"),
    "a mask": (lambda m: m.mask.logical_not_(), "buffers are others"),
    "running statistics": (trained_mode, "buffers are others"),
    "temperature": (lambda m: setattr(m, "temperature", 4.0), "settings of modules are others"),
    "eps": (lambda m: setattr(m.norm, "eps", 0.1), "settings of modules are others"),
}
SAME = {
    "a forward": lambda m: m(torch.randn(2, 12)),
    "a private name that nobody reads": lambda m: setattr(m, "_note", "evaluated"),
    "a larger table": lambda m: m.grow(20),
    "a count": lambda m: m.calls.add_(3),
    "its name": lambda m: setattr(m, "name_or_path", "/elsewhere"),
    "checkpoints": lambda m: setattr(m, "gradient_checkpointing", True),
    "a gradient": lambda m: m(torch.randn(2, 12)).sum().backward(),
    "a saved state": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
}


def data(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 12, generator=g), torch.randint(5, (4,), generator=g)) for _ in range(n)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_computes_something_else_is_another(change):
    model = Net().eval()
    train = compressor(model=model).compress(data(3))
    CHANGES[change][0](model)
    query = compressor(model=model).compress(data(1, 1))
    with pytest.raises(ValueError, match=CHANGES[change][1]):
        dropinf.score(query, train, kind="dot")
    dropinf.score(query, train, kind="dot", other_model=True)


@pytest.mark.parametrize("change", SAME)
def test_a_model_that_computes_the_same_is_the_same(change):
    model = Net().eval()
    train = compressor(model=model).compress(data(3))
    SAME[change](model)
    dropinf.score(compressor(model=model).compress(data(1, 1)), train, kind="dot")


class Hidden:
    def __init__(self, scale):
        self.scale = scale


class Scaled(nn.Module):
    """Its scale is where no comparison of code looks."""

    def __init__(self, scale):
        super().__init__()
        self.of, self.hidden = make_model(), Hidden(scale)

    def forward(self, x):
        return self.of(x) * self.hidden.scale


@dataclasses.dataclass
class Fields:
    x: Any
    y: Any


def of_any(model, batch):
    if isinstance(batch, Fields):
        batch = batch.x, batch.y
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
    return F.cross_entropy(model(x), y, reduction="none")


FORMS = {
    "pairs": lambda x, y: (x, y),
    "lists": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y},
    "a key more": lambda x, y: {"x": x, "y": y, "number": torch.arange(len(x))},
    "fields": Fields,
}


@pytest.mark.parametrize("now", FORMS)
@pytest.mark.parametrize("then", ["pairs", "dict"])
def test_the_first_batch_is_compared_whatever_form_batches_have_now(then, now, tmp_path):
    index = compressor(of_any, Scaled(1.0)).compress([FORMS[then](*b) for b in make_batches()], out=tmp_path / "idx")
    more = [FORMS[now](*b) for b in make_batches(2, 5)]
    with pytest.raises(ValueError, match="they now give others than the gradients it holds"):
        dropinf.Compressor.from_index(index, Scaled(4.0), of_any).compress(more)
    with pytest.raises(ValueError, match="they now give others than the gradients it holds"):
        compressor(of_any, Scaled(4.0)).compress(more, out=tmp_path / "idx", append=True)
    dropinf.Compressor.from_index(index, Scaled(1.0), of_any).compress(more)
    compressor(of_any, Scaled(1.0)).compress(more, out=tmp_path / "idx", append=True)


def test_a_first_batch_that_cannot_be_compared_is_told_of(tmp_path):
    def of_fields(model, batch):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    index = compressor(of_fields).compress([Fields(*b) for b in make_batches()], out=tmp_path / "idx")
    with pytest.warns(UserWarning, match="the first batch that it keeps could not be compared"):
        dropinf.Compressor.from_index(index, make_model(), of_fields).compress(
            [SimpleNamespace(x=x, y=y) for x, y in make_batches(2, 5)]
        )


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_masks_that_are_lost_are_written_again(damage, tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    path = tmp_path / "idx" / SKETCH
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[:-1])
    assert index.verify()
    compressor().compress(make_batches(), out=tmp_path / "idx")
    assert path.read_bytes() == whole
    assert not dropinf.Index.open(tmp_path / "idx").verify()


CORRECTED = {
    "other gradients": lambda: compressor().compress(relabelled(make_batches())),
    "a part": lambda: compressor().compress(make_batches())[:7],
    "another model": lambda: compressor(model=make_model(1)).compress(make_batches()),
}


@pytest.mark.parametrize("what", CORRECTED)
def test_a_correction_by_other_gradients_is_not_kept(what, tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    fisher = dropinf.Fisher("kronecker").update(index).correct(CORRECTED[what]())
    with pytest.raises(ValueError, match=r"fisher: it is of other gradients|of different models"):
        index.save_fisher(fisher)
    index.save_fisher(dropinf.Fisher("kronecker").update(index).correct(index))


def test_a_fisher_matrix_of_two_losses_is_not_kept(tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    rows = [compressor(loss).compress(make_batches()) for loss in (plain, tripled)]
    half = len(rows[0]) // 2
    mixed = dropinf.Gradients.cat([rows[0][:half], rows[1][half:]])
    with pytest.raises(ValueError, match="of another loss"):
        index.save_fisher(dropinf.build_fisher(mixed))


@pytest.mark.parametrize("more", [None, b"raw", Path("a.png"), np.float32(2)], ids=str)
def test_a_first_batch_with_more_in_it_is_compared(more, tmp_path):
    batches, later = ([{"x": x, "y": y, "more": more} for x, y in make_batches(n, n)] for n in (4, 2))
    index = compressor(of_any, Scaled(1.0)).compress(batches, out=tmp_path / "idx")
    with pytest.raises(ValueError, match="they now give others than the gradients it holds"):
        dropinf.Compressor.from_index(index, Scaled(4.0), of_any).compress(later)
    dropinf.Compressor.from_index(index, Scaled(1.0), of_any).compress(later)


def test_an_index_that_keeps_no_first_batch_says_so(tmp_path):
    batches = [{"x": x, "y": y, "more": Hidden(2)} for x, y in make_batches()]
    index = compressor(of_any).compress(
        batches, out=tmp_path / "idx", ids=lambda b: [str(v) for v in b["x"][:, 0].tolist()]
    )
    with pytest.warns(UserWarning, match="it keeps no first batch to compare"):
        dropinf.Compressor.from_index(index, make_model(), of_any).compress(batches)


class Growing(nn.Module):
    """A model with a table of angles that is not saved, and as long as the longest sequence that it has met."""

    def __init__(self, how):
        super().__init__()
        self.how, self.embed, self.head = how, nn.Embedding(8, 4), nn.Linear(4, 3)
        self.register_buffer("angles", torch.zeros(0, 4), persistent=False)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, tokens):
        if tokens.shape[1] > len(self.angles):
            self.grow(tokens.shape[1])
        return self.head(self.embed(tokens) * self.angles[: tokens.shape[1]] * self.scale).mean(1)

    def grow(self, length):
        angles = torch.outer(torch.arange(1.0, length + 1), torch.arange(1.0, 5)).cos()
        if self.how == "assigned":
            self.angles = angles
        else:
            self.register_buffer("angles", angles, persistent=False)


def sequences(length, seed):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randint(8, (3, length), generator=draw), torch.arange(3)) for _ in range(2)]


def growing(how):
    torch.manual_seed(0)
    return Growing(how)


@pytest.mark.parametrize("how", ["assigned", "registered"])
def test_a_table_that_grows_makes_no_other_model(how, tmp_path):
    model = growing(how)
    index = compressor(model=model).compress(sequences(4, 1), out=tmp_path / "idx")
    model(sequences(7, 0)[0][0])
    index = compressor(model=model).compress(sequences(9, 2), out=tmp_path / "idx", append=True)
    again = growing(how)
    queries = dropinf.Compressor.from_index(index, again, plain).compress(sequences(5, 3))
    want = compressor(model=again).compress([*sequences(4, 1), *sequences(9, 2)])
    torch.testing.assert_close(index[:].flat, want.flat)
    torch.testing.assert_close(dropinf.score(queries, index, kind="dot"), dropinf.score(queries, want, kind="dot"))
    again.scale.fill_(3)
    with pytest.raises(ValueError, match="its classes and constants are not those that"):
        dropinf.Compressor.from_index(index, again, plain)
    with pytest.raises(ValueError, match="of different models"):
        dropinf.score(compressor(model=again).compress(sequences(5, 3)), index, kind="dot")
