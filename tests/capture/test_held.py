"""What modules hold beside parameters is in each batch what it was in the first; what cannot be put back is refused."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from tests.capture.right_or_refused import doubles  # noqa: F401

LATE = 12  # forwards, more than there are until the last audit of a call of eight batches


@dataclasses.dataclass
class Count:
    step: int = 0


class Nested:
    def __init__(self):
        self.inner = Count()


MEMORIES = {
    "list": (list, lambda m: m.append(0) or len(m)),
    "deque": (lambda: collections.deque(maxlen=64), lambda m: m.append(0) or len(m)),
    "dict": (dict, lambda m: m.update({len(m): 1}) or len(m)),
    "set": (set, lambda m: m.add(len(m)) or len(m)),
    "bytearray": (bytearray, lambda m: m.append(0) or len(m)),
    "an array": (lambda: np.zeros(1), lambda m: int(m.__iadd__(1)[0])),
    "a dataclass": (Count, lambda m: setattr(m, "step", m.step + 1) or m.step),
    "an object in an object": (Nested, lambda m: setattr(m.inner, "step", m.inner.step + 1) or m.inner.step),
    "a tensor in a dataclass": (lambda: Count(torch.zeros(())), lambda m: int(m.step.add_(1))),
}


class Late(nn.Module):
    """What it computes changes once it was called often enough: a queue that is full, say."""

    def __init__(self, memory):
        super().__init__()
        self.l, (make, self.count) = nn.Linear(3, 4), memory
        self.memory = make()

    def forward(self, x):
        return self.l(x) * (1.0 if self.count(self.memory) <= LATE else 3.0)


def squares(model, x):
    return model(x).square().flatten(1).sum(1)


def check_put_back(memory):
    model = Late(memory).eval()
    batches = [torch.randn(4, 3) for _ in range(LATE)]
    x = torch.cat(batches)
    want = torch.einsum("no,ni->noi", 2 * model.l(x).detach(), x)
    found = dropinf.Compressor(model, dropinf.Identity(), squares).compress(batches)
    torch.testing.assert_close(found["l"], want)
    assert model.count(model.memory) == 1


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_is_put_back(kind):
    check_put_back(MEMORIES[kind])


class LargeBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 4)
        self.register_buffer("queue", torch.zeros(20 << 20, dtype=torch.uint8))

    def forward(self, x):
        self.queue[0] += 1
        return self.l(x) * (1.0 if self.queue[0] <= LATE else 3.0)


def test_a_buffer_too_large_to_be_put_back_is_refused_where_it_is_written():
    batches, model = [torch.randn(4, 3) for _ in range(4)], LargeBuffer()
    with pytest.raises(ValueError, match=r"writes to a tensor that it holds, of shape \[20971520\] and 20 MiB"):
        dropinf.Compressor(model.eval(), dropinf.Identity(), squares).compress(batches)
    found = dropinf.Compressor(LargeBuffer().train(), dropinf.Identity(), squares).compress(batches)  # as it says
    assert len(found) == 16


@pytest.mark.parametrize("limit", [None, 1.0, 1e9])
def test_weights_that_look_ups_shorten_may_be_written_between_batches(limit):
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(6, 3))
    model, data = nn.Sequential(nn.Embedding(6, 3, max_norm=limit), nn.Flatten(), nn.Linear(6, 2)), []
    model[0].weight = table
    ids = torch.randint(6, (4, 5, 2))
    weights = [p.detach().clone() for p in model.parameters()]

    def batches():
        for batch in ids:
            yield batch
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)

    for i, batch in enumerate(ids):
        twin = nn.Sequential(nn.Embedding(6, 3, max_norm=limit), nn.Flatten(), nn.Linear(6, 2))
        with torch.no_grad():
            for p, w in zip(twin.parameters(), weights, strict=True):
                p.copy_(w * 1.5**i)
        losses = squares(twin, batch)
        data += [torch.autograd.grad(loss, twin[2].weight, retain_graph=True)[0] for loss in losses]
    found = dropinf.Compressor(model, dropinf.Identity(), squares).compress(batches())
    torch.testing.assert_close(found["2"], torch.stack(data))
    for p, w in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), w * 1.5 ** len(ids))


def test_the_losses_alone_leave_shortened_weights_as_they_were():
    model = nn.Sequential(nn.Embedding(6, 3, max_norm=0.1), nn.Flatten())
    before = model[0].weight.detach().clone()
    dropinf.Compressor(model, dropinf.Identity(), squares).losses(torch.arange(6)[:, None])
    assert torch.equal(model[0].weight, before)


def test_a_skeleton_on_meta_is_held():
    """As in PyTorch's tutorial on ensembles."""

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            members = [nn.Linear(3, 2) for _ in range(3)]
            stacked, _ = torch.func.stack_module_state(members)
            self.names, self.skeleton = list(stacked), [nn.Linear(3, 2).to("meta")]
            self.weights = nn.ParameterList([nn.Parameter(w.detach()) for w in stacked.values()])

        def forward(self, x):
            def call(weights):
                return torch.func.functional_call(self.skeleton[0], weights, (x,))

            return torch.vmap(call)(dict(zip(self.names, self.weights, strict=True))).mean(0)

    model, x = Ensemble().train(), torch.randn(4, 3)
    found = dropinf.Compressor(model, dropinf.Identity(), squares).compress([x])
    name = next(name for name, layer in dropinf.Compressor(model, dropinf.Identity(), squares).layers.items())
    weight = dict(model.named_parameters())["weights.0"]
    want = torch.stack([torch.autograd.grad(loss, weight)[0] for loss in (squares(model, row[None])[0] for row in x)])
    torch.testing.assert_close(found[name].reshape(want.shape), want)


class Power(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 4)

    def forward(self, x):
        return self.l(x) ** 2 / (1 + (x**2).mean(-1, keepdim=True))


def test_operators_of_tensors_are_torch_s_own():
    compressor = dropinf.Compressor(Power(), dropinf.Identity(), squares)
    compressor.compress([torch.randn(4, 3) for _ in range(8)])
    assert [audit.batch for audit in compressor.audits] == [1, 4]


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.randn(6, 16))

    def forward(self, x):
        q = (x + self.p)[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


CAST = {
    "gru": lambda: nn.GRU(16, 16, batch_first=True),
    "lstm": lambda: nn.LSTM(16, 16, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True),
    "positions": Positions,
    "prelu": lambda: nn.Sequential(nn.Linear(16, 16).requires_grad_(False), nn.PReLU()),
}


@pytest.mark.parametrize("name", CAST)
def test_what_ops_cast_for_themselves_is_rounding(name):
    """Autocast casts inside ops whose results are float32 again."""
    torch.manual_seed(0)
    model = CAST[name]().float().eval()

    def loss_fn(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return (out[0] if isinstance(out, tuple) else out).float().square().flatten(1).sum(1)

    x = torch.randn(8, 6, 16, dtype=torch.float32)
    compressor = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    found = compressor.compress([x, x + 1])
    total = torch.autograd.grad(loss_fn(model, x).sum(), [p for p in model.parameters() if p.requires_grad])
    for layer, g in zip(compressor.layers, total, strict=True):
        error = (found[layer][:8].sum(0).reshape(g.shape) - g).norm() / g.norm()
        assert float(error) < 0.1, layer


class Slots:
    __slots__ = ("step",)

    def __init__(self):
        self.step = 0


def replaced(members):
    members.add(max(members) + 1)
    members.discard(min(members))
    return max(members)


def moved(order):
    order.move_to_end(next(iter(order)))
    order["n"] = order.pop("n") + 1
    return order["n"]


MORE = {
    "slots": (Slots, lambda m: setattr(m, "step", m.step + 1) or m.step),
    "a hidden module": (lambda: [nn.Sequential()], lambda m: vars(m[0]).update(n=vars(m[0]).get("n", 0) + 1) or m[0].n),
    "a set of as many": (lambda: {0}, replaced),
    "an order": (lambda: collections.OrderedDict(n=0, m=1), moved),
    "a dictionary of its user's": (collections.UserDict, lambda m: m.update({len(m): 1}) or len(m)),
    "a method of an object": (lambda: Nested().inner.__init__, lambda m: m(m.__self__.step + 1) or m.__self__.step),
    "a list in a partial": (lambda: functools.partial(len, []), lambda m: m.args[0].append(0) or m()),
}


@pytest.mark.parametrize("kind", MORE)
def test_other_memories_are_put_back(kind):
    check_put_back(MORE[kind])


class Hook:
    def __init__(self):
        self.calls = 0

    def __call__(self, _module, _args, out):
        self.calls += 1
        return out * (1.0 if self.calls <= LATE else 3.0)


def test_hooks_that_are_objects_are_put_back():
    model, x = nn.Sequential(nn.Linear(3, 4)), [torch.randn(4, 3) for _ in range(LATE)]
    hook = Hook()
    model.register_forward_hook(hook)
    want = torch.einsum("no,ni->noi", 2 * model[0](torch.cat(x)).detach(), torch.cat(x))
    torch.testing.assert_close(dropinf.Compressor(model, dropinf.Identity(), squares).compress(x)["0"], want)
    assert hook.calls == 0


def test_iterators_are_documented_to_be_left():
    """Nothing puts back what an iterator gave: README says so."""
    model = Late((lambda: itertools.count(1), next)).eval()
    dropinf.Compressor(model, dropinf.Identity(), squares).compress([torch.randn(4, 3)])
    assert next(model.memory) > 2
