"""What would put rows of other data, models or losses into an index, and looks the same from outside."""

from __future__ import annotations

import dataclasses
import enum
import os
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dropinf
from dropinf.index.codec import NOISE
from dropinf.index.rows_alike import _scaled, _worst
from tests.index.small import loss_fn, make_batches, make_compressor, make_model
from tests.index.test_runs import StopError, interrupted

QUERIES = make_batches(2, 9)


def compressor(loss=loss_fn, model=None):
    return dropinf.Compressor(model or make_model(), dropinf.Dropout(6), loss)


class Once:
    """Batches that one iterator gives, whoever asks, as a progress bar around a generator."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        yield from self.batches


class Stream(IterableDataset):
    def __iter__(self):
        for x, y in make_batches():
            yield from zip(x, y, strict=True)


def test_a_wrapper_of_an_iterator_is_refused_and_the_iterator_is_not(tmp_path):
    with pytest.raises(ValueError, match="their first batch is another one when it is read again"):
        compressor().compress(Once(make_batches()), out=tmp_path / "idx")
    index = compressor().compress(iter(make_batches()), out=tmp_path / "other")
    assert torch.equal(index[:].flat, compressor().compress(make_batches()).flat)


def test_a_length_that_is_not_that_of_the_batches_is_refused(tmp_path):
    class Long(Once):
        def __len__(self):
            return 12

        def __iter__(self):
            return iter(make_batches())

    with pytest.raises(ValueError, match=r"their len\(\) is 12, and 9 came"):
        compressor().compress(Long([]), out=tmp_path / "idx")


def test_a_stream_has_no_length(tmp_path):
    loader = DataLoader(Stream(), 4)
    index = compressor().compress(loader, out=tmp_path / "idx")
    assert torch.equal(index[:].flat, compressor().compress(loader).flat)
    with pytest.raises(TypeError, match="loader is DataLoader of a stream"):
        dropinf.Parts(loader)


class Mixing:
    """Numbers of samples, no subclass of torch's Sampler, of which a few are mixed anew each time."""

    def __init__(self, count, size, last=None):
        self.count, self.size, self.last, self.times = count, size, last, 0

    def __iter__(self):
        self.times += 1
        start = 0 if self.last is None else self.count - self.last
        mine = list(range(start, self.count))
        random.Random(self.times).shuffle(mine)
        mine = [*range(start), *mine]
        return iter([mine[i : i + self.size] for i in range(0, self.count, self.size)] if self.size else mine)

    def __len__(self):
        return -(-self.count // (self.size or 1))


class Fixed(Mixing):
    """Numbers in an order that is none of theirs, and the same each time."""

    def __iter__(self):
        self.times = 0
        return super().__iter__()


X, Y = (torch.cat(parts) for parts in zip(*make_batches(), strict=True))


def loader_of(sampler):
    options = {"batch_sampler": sampler} if getattr(sampler, "size", 1) else {"sampler": sampler, "batch_size": 4}
    return dropinf.Parts(DataLoader(TensorDataset(X[:24], Y[:24]), **options))


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (Mixing(24, 4), "Mixing"),
        (Mixing(24, 12), "Mixing"),
        (Mixing(24, 1, last=2), "Mixing"),
        (Mixing(24, 0), "Mixing"),
        (iter([[*range(12)], [*range(12, 24)]]), "list_iterator"),
    ],
)
def test_parts_of_a_sampler_that_mixes_anew_are_refused(sampler, name, tmp_path):
    made = compressor()
    state = random.getstate(), torch.get_rng_state()
    message = f"batches: their sampler {name} gives other numbers of samples when it is read again"
    with pytest.raises(ValueError, match=message):
        made.compress(loader_of(sampler), out=tmp_path / "idx")
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize("sampler", [Fixed(24, 4), Fixed(24, 0), list(Fixed(24, 5)), range(23, -1, -1)])
def test_parts_of_a_fixed_sampler_stand_in_the_order_of_the_data(sampler, tmp_path):
    if isinstance(sampler, range):
        loader = dropinf.Parts(DataLoader(TensorDataset(X[:24], Y[:24]), 4, sampler=sampler))
    else:
        loader = loader_of(sampler)
    index = compressor().compress(loader, out=tmp_path / "idx")
    torch.testing.assert_close(index[:].flat, compressor().compress([(X[:24], Y[:24])]).flat)


def test_a_first_batch_that_is_the_largest_asks_for_no_more_memory_than_there_is():
    few = torch.zeros(1, 12).double(), torch.zeros(1, dtype=torch.int64)
    batches = [(torch.zeros(4000, 12).double(), torch.zeros(4000, dtype=torch.int64)), *[few] * 3]

    class Endless(list):
        def __len__(self):
            return 1 << 40

    assert len(compressor().compress(Endless(batches))) == 4003


@pytest.mark.parametrize("how", ["in place", "behind autograd"])
def test_a_model_that_changes_between_batches_is_refused(how, tmp_path):
    model = make_model()
    want = compressor().compress(make_batches()).flat

    def changing():
        for b, batch in enumerate(make_batches()):
            if b == 6:
                weight = model[0].weight
                (weight.data if how == "behind autograd" else weight.detach()).mul_(2)
            yield batch

    with pytest.raises(ValueError, match="its weights changed while its batches were compressed"):
        compressor(model=model).compress(changing(), out=tmp_path / "idx")
    index = compressor().compress(iter(make_batches()), out=tmp_path / "idx")
    assert index.verify() == []
    assert torch.equal(index[:].flat, want)


class Scaled(nn.Sequential):
    """A model with a setting and a constant that is not saved."""

    def __init__(self, *modules, factor=1.0, constant=1.0):
        super().__init__(*modules)
        self.factor = factor
        self.register_buffer("constant", torch.tensor(constant), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.factor * self.constant


def test_a_model_that_computes_something_else_is_refused(tmp_path):
    made = compressor(model=Scaled(*make_model())).compress(make_batches(), out=tmp_path / "idx")
    with_relu = make_model()
    with_relu[1] = nn.ReLU()
    for other in (Scaled(*with_relu), Scaled(*make_model(), constant=5.0)):
        with pytest.raises(ValueError, match="its classes and constants are not those that"):
            compressor(model=other).compress(make_batches(3, 5), out=tmp_path / "idx", append=True)
        with pytest.raises(ValueError, match="its classes and constants are not those that"):
            dropinf.Compressor.from_index(made, other, loss_fn)
    with (
        pytest.warns(UserWarning, match="its attributes are not those that"),
        pytest.raises(ValueError, match=r"it is not the one that .*settings of modules are others"),
    ):
        compressor(model=Scaled(*make_model(), factor=5.0)).compress(
            make_batches(3, 5), out=tmp_path / "idx", append=True
        )


WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 50.0]).double()


def test_classes_that_only_late_batches_have_show_another_loss(tmp_path):
    batches = [(x, y.clamp(max=3 if 2 < b < 6 else 2)) for b, (x, y) in enumerate(make_batches())]
    with pytest.raises(StopError):
        compressor().compress(interrupted(batches, 7), out=tmp_path / "idx")

    def weighted(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none", weight=WEIGHTS)

    with (
        pytest.warns(UserWarning, match="rows of two losses do not belong in one index"),
        pytest.raises(ValueError, match=r"batch [345], computed again, has other gradients"),
    ):
        compressor(weighted).compress(batches, out=tmp_path / "idx")


@pytest.mark.parametrize(("dtype", "factor"), [(torch.int8, 1.08), (torch.bfloat16, 1.05), (torch.float16, 1.01)])
def test_a_loss_that_is_a_little_larger_is_refused(dtype, factor, tmp_path):
    with pytest.raises(StopError):
        compressor().compress(interrupted(make_batches(), 5), out=tmp_path / "idx", dtype=dtype)

    def larger(model, batch):
        return factor * loss_fn(model, batch)

    with pytest.warns(UserWarning, match="two losses"), pytest.raises(ValueError, match="has other gradients"):
        compressor(larger).compress(make_batches(), out=tmp_path / "idx", dtype=dtype)


def holding(factor):
    def loss(model, batch):
        return factor * loss_fn(model, batch)

    return loss


class Counted:
    def __init__(self, factor):
        self.factor, self.calls = factor, []

    def __call__(self, model, batch):
        self.calls.append(batch)
        return self.factor * loss_fn(model, batch)


@pytest.mark.parametrize("kind", [holding, lambda f: holding(torch.full((1,), float(f))), Counted])
def test_what_a_loss_holds_is_part_of_it(kind, tmp_path):
    compressor(kind(1)).compress(make_batches(), out=tmp_path / "idx")
    with pytest.raises(ValueError, match="rows of two losses"):
        compressor(kind(2)).compress(make_batches(3, 5), out=tmp_path / "idx", append=True)


def test_an_iterator_of_the_same_data_and_another_loss_is_not_dropped(tmp_path):
    index = compressor(holding(1)).compress(make_batches(), out=tmp_path / "idx")
    with pytest.raises(ValueError, match="two losses"):
        compressor(holding(2)).compress(iter(make_batches()), out=tmp_path / "idx", append=True)
    assert len(dropinf.Index(tmp_path / "idx")) == len(index)


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor
    kind: str = ""

    def __post_init__(self):
        self.weight = 1.0


class Level(enum.Enum):
    LOW = 1
    HIGH = 7

    def __str__(self):
        return "level"


class Named(dict):
    pass


def with_attribute(batch, weight):
    batch.weight = weight
    return batch


OF = {
    "dataclass": (
        lambda b, w: with_attribute(Batch(*b), w),
        lambda m, b: loss_fn(m, (b.x, b.y)) * b.weight,
    ),
    "dictionary": (
        lambda b, w: with_attribute(Named(x=b[0], y=b[1]), w),
        lambda m, b: loss_fn(m, (b["x"], b["y"])) * b.weight,
    ),
    "tensor": (
        lambda b, w: (with_attribute(b[0].clone(), w), b[1]),
        lambda m, b: loss_fn(m, b) * b[0].weight,
    ),
    "enum": (
        lambda b, w: (*b, Level.LOW if w == 1 else Level.HIGH),
        lambda m, b: loss_fn(m, b) * b[2].value,
    ),
}


@pytest.mark.parametrize("kind", OF)
def test_values_that_are_set_on_a_batch_are_part_of_it(kind, tmp_path):
    make, loss = OF[kind]
    with pytest.raises(StopError):
        compressor(loss).compress(interrupted([make(b, 1) for b in make_batches()], 6), out=tmp_path / "idx")
    others = [make(b, 7 if 0 < i < 5 else 1) for i, b in enumerate(make_batches())]
    with pytest.raises(ValueError, match="batch 1 is another than the one whose rows are in"):
        compressor(loss).compress(others, out=tmp_path / "idx")


def test_a_run_ends_with_as_many_batches_as_it_began_with(tmp_path):
    batches = make_batches(16)
    with pytest.raises(StopError):
        compressor().compress(interrupted(batches[:12], 6), out=tmp_path / "idx")
    with pytest.raises(ValueError, match="was begun with 12 of them, and there are more now"):
        compressor().compress(iter(batches), out=tmp_path / "idx")
    compressor().compress(iter(batches[:12]), out=tmp_path / "idx")
    assert len(compressor().compress(batches[:12], out=tmp_path / "idx", append=True)) == sum(
        len(x) for x, _ in batches[:12]
    )


def test_a_shard_that_changes_and_keeps_its_time_is_noticed(tmp_path):
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    query = make_compressor().compress(QUERIES)
    dropinf.score(query, index, kind="dot")
    path = sorted((tmp_path / "idx" / "shards").iterdir())[2]
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"damaged, its bytes do not match|changed"):
        dropinf.score(query, index, kind="dot")


def test_a_process_that_was_forked_of_a_run_keeps_no_lock(tmp_path):
    reader, writer = os.pipe()
    children = []

    def forking():
        for b, batch in enumerate(make_batches()):
            if b == 4:
                child = os.fork()
                if child == 0:
                    os.close(writer)
                    os.read(reader, 1)  # until the test is over
                    os._exit(0)
                children.append(child)
            yield batch

    try:
        compressor().compress(forking(), out=tmp_path / "idx")
        compressor().compress(make_batches(3, 5), out=tmp_path / "idx", append=True)
    finally:
        os.close(writer)
        os.close(reader)
        for child in children:
            os.waitpid(child, 0)


@pytest.mark.parametrize(("size", "same"), [(1e-8, True), (1e-5, False)])
def test_rounding_in_a_layer_without_a_gradient_is_no_disagreement(size, same):
    """Queries of passages of one token have none, and another processor rounds otherwise."""
    shapes, widths, noise = {"queries": (2, 4), "values": (3,)}, (8, 3), NOISE * torch.finfo(torch.float32).eps
    kept = torch.ones(4, 11, dtype=torch.float64)
    now = kept.clone()
    kept[:, :8], now[:, :8] = size * torch.randn(2, 4, 8, dtype=torch.float64)
    assert (_worst(shapes, widths, now, kept, noise)[1] == 0) == same
    assert (_scaled(shapes, widths, now, kept, noise)[1] == 0) == same
    assert _worst(shapes, widths, now, kept, 0)[1] > 0.1
