"""What its user changes between batches stays changed; what nothing counts, and what batches share, is put back too."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from torch import nn

import dropinf
from tests.capture.right_or_refused import doubles  # noqa: F401
from tests.capture.test_held import LATE, MEMORIES, Nested, squares


class Loader:
    """Where it stands is an attribute; the model holds it."""

    def __init__(self, data):
        self.data, self.place = data, 0

    def __iter__(self):
        while self.place < len(self.data):
            self.place += 1
            yield self.data[self.place - 1]


@pytest.mark.parametrize("held", ["loader", "deque", "trainer"])
def test_what_its_user_changes_between_batches_stays_changed(held):
    model, data = nn.Linear(3, 2), [torch.randn(4, 3) for _ in range(6)]
    want = torch.einsum("no,ni->noi", 2 * model(torch.cat(data)).detach(), torch.cat(data))
    if held == "loader":
        model.loader = Loader(data)
        found = dropinf.Compressor(model, dropinf.Identity(), squares).compress(model.loader)
        assert model.loader.place == len(data)
    elif held == "deque":
        model.queue = collections.deque(data)

        def batches():
            while model.queue:
                yield model.queue.popleft()

        found = dropinf.Compressor(model, dropinf.Identity(), squares).compress(batches())
        assert not model.queue
    else:
        model.trainer = Nested()
        model.trainer.model = model

        def counted():
            for x in data:
                model.trainer.inner.step += 1
                yield x

        found = dropinf.Compressor(model, dropinf.Identity(), squares).compress(counted())
        assert model.trainer.inner.step == len(data)
    torch.testing.assert_close(found["weight" if "weight" in found.shapes else next(iter(found.shapes))], want)


def test_a_setting_in_a_container_counts_from_the_batch_on_for_which_it_was_set():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.config = nn.Linear(3, 2), {"scale": 1.0}

        def forward(self, x):
            return self.l(x) * self.config["scale"]

    model, data = Scaled(), [torch.randn(4, 3) for _ in range(6)]

    def batches():
        for b, x in enumerate(data):
            if b == 2:
                model.config["scale"] = 2.0
            yield x

    x = torch.cat(data)
    scale = torch.tensor([1.0, 1, 4, 4, 4, 4]).repeat_interleave(4)[:, None]
    want = torch.einsum("no,ni->noi", 2 * model.l(x).detach() * scale, x)
    found = dropinf.Compressor(model, dropinf.Identity(), squares).compress(batches())
    torch.testing.assert_close(found["l"], want)


class Written(nn.Module):
    """A buffer that a forward writes to by ``.data``, which nothing counts."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count.data += 1
        return self.l(x) * (1.0 if self.count <= LATE else 3.0)


def test_a_buffer_that_is_written_through_data_is_put_back():
    model, x = Written().eval(), [torch.randn(4, 3) for _ in range(LATE)]
    want = torch.einsum("no,ni->noi", 2 * model.l(torch.cat(x)).detach(), torch.cat(x))
    torch.testing.assert_close(dropinf.Compressor(model, dropinf.Identity(), squares).compress(x)["l"], want)
    assert model.count == 0


def test_an_average_of_weights_in_a_forward_is_refused():
    """As momentum encoders have it."""

    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            self.k.weight.data = 0.999 * self.k.weight.data + 0.001 * self.q.weight.data
            return self.q(x) * self.k(x).detach()

    with pytest.raises(ValueError, match=r"writes to (a|its) parameter"):
        dropinf.Compressor(Momentum(), dropinf.Identity(), squares).compress([torch.randn(4, 3) for _ in range(4)])


@pytest.mark.parametrize("kind", ["deque", "set", "an array"])
def test_what_batches_share_is_put_back(kind):
    make, count = MEMORIES[kind]
    shared, model = make(), nn.Linear(3, 4)

    def loss_fn(m, batch):
        return squares(m, batch[0]) * (1.0 if count(batch[1]) <= LATE else 3.0)

    x = [torch.randn(4, 3) for _ in range(LATE)]
    want = torch.einsum("no,ni->noi", 2 * model(torch.cat(x)).detach(), torch.cat(x))
    found = dropinf.Compressor(model, dropinf.Identity(), loss_fn).compress([(batch, shared) for batch in x])
    torch.testing.assert_close(found[next(iter(found.shapes))], want)


def test_weights_that_change_under_one_autocast_are_those_of_each_batch():
    """Autocast keeps what it cast."""
    model, x = nn.LSTM(3, 4, batch_first=True).float(), [torch.randn(4, 5, 3, dtype=torch.float32) for _ in range(3)]

    def loss_fn(m, batch):
        return m(batch)[0].float().square().flatten(1).sum(1)

    def batches():
        for batch in x:
            yield batch
            with torch.no_grad():
                model.weight_ih_l0.mul_(2)

    weight = model.weight_ih_l0.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        found = dropinf.Compressor(model, dropinf.Identity(), loss_fn).compress(batches())
    for i, batch in enumerate(x):
        with torch.no_grad():
            model.weight_ih_l0.copy_(weight * 2**i)
        total = torch.autograd.grad(loss_fn(model, batch).sum(), model.weight_ih_l0)[0]
        rows = found["weight_ih_l0"][4 * i : 4 * i + 4].sum(0).reshape(total.shape)
        assert float((rows - total).norm() / total.norm()) < 0.1


def test_sparse_buffers_are_left_alone():
    model = nn.Linear(3, 2).train()
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    assert len(dropinf.Compressor(model, dropinf.Identity(), squares).compress([torch.randn(4, 3)])) == 4


@dataclasses.dataclass(slots=True)
class SlotsConfig:
    width: int = 3


def test_a_configuration_with_slots_is_read():
    model = nn.Linear(3, 2)
    model.config = SlotsConfig()
    assert len(dropinf.Compressor(model, dropinf.Identity(), squares).compress([torch.randn(4, 3)])) == 4


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers_are_of_the_model(layout, tmp_path):
    model = nn.Linear(3, 2)
    model.register_buffer("adjacency", torch.eye(3).to_sparse(layout=layout))
    compressor = dropinf.Compressor(model, dropinf.Identity(), squares)
    index = compressor.compress([torch.randn(4, 3)], out=tmp_path / "idx")
    dropinf.score(compressor.compress([torch.randn(4, 3)]), index, kind="dot")
    model.adjacency = 2 * model.adjacency
    with pytest.raises(ValueError, match="buffers are others"):
        dropinf.score(compressor.compress([torch.randn(4, 3)]), index, kind="dot")
