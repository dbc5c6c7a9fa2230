"""One rank: compress with a wrapped model, compare with the plain one, and train a step."""

from __future__ import annotations

import contextlib
import copy
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dropinf


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.relu(self.up(self.norm(x)), inplace=True))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), Block(), Block(), nn.Flatten(), nn.Linear(40, 3))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Borrowing(nn.Module):
    """Uses a child's weight without calling the child."""

    def __init__(self):
        super().__init__()
        self.child, self.other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.other(self.child(x)), self.child.weight)


class Scaled(nn.Module):
    """Has a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.other, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.other(x) * self.scale


def wrap(kind: str, model: nn.Module, **options) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    for block in (model[1], model[2]):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def step(model: nn.Module, batch) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_fn(model, batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [whole(p.detach()).clone() for p in model.parameters()]


def assert_close(found: dropinf.Gradients, expected: dropinf.Gradients) -> None:
    found.check_same_sketch(expected)
    torch.testing.assert_close(found.flat, expected.flat, rtol=1e-5, atol=1e-7)


def assert_same_step(model: nn.Module, other: nn.Module, batch) -> None:
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for a, b in zip(step(model, batch), step(other, batch), strict=True):
        assert torch.equal(a, b)


def calibrated_in_parts(wrapped: nn.Module, plain: nn.Module) -> None:
    """Each rank calibrates on its own batch: together, as one process does on both."""
    generator = torch.Generator().manual_seed(7)
    data = [
        (torch.randint(0, 11, (n, 5), generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for n in (6, 6)
    ]
    sketch = dropinf.Dropout(2, rank=4, whiten=True)
    alone, shared = dropinf.Compressor(plain, sketch, loss_fn), dropinf.Compressor(wrapped, sketch, loss_fn)
    alone.calibrate(data)
    shared.calibrate([data[dist.get_rank()]])
    before = shared.digest()
    shared.merge_calibration()
    assert before != shared.digest()
    for name in alone.layers:
        for side, moment in alone.moments(name).items():
            torch.testing.assert_close(shared.moments(name)[side], moment, rtol=1e-5, atol=1e-9)
    everywhere: list[dict[str, str] | None] = [None, None]
    dist.all_gather_object(everywhere, shared.digest())
    assert everywhere[0] == everywhere[1]


def after_a_failure(kind: str, plain: nn.Module, data) -> None:
    """An error in or after a forward, or a NaN, in the second batch: the model trains on, and compresses again."""

    def inside(model, batch):
        def fail(*_):
            raise KeyError("half way")

        handle = model[2].down.register_forward_hook(fail) if len(batch[0]) == 3 else contextlib.nullcontext()
        with handle:
            return loss_fn(model, batch)

    def failing(model, batch):
        losses = loss_fn(model, batch)
        if len(losses) == 3:
            raise KeyError("half way")
        return losses

    def poisoned(model, batch):
        losses = loss_fn(model, batch)
        return losses * float("nan") if len(losses) == 3 else losses

    expected = dropinf.compress(plain, data, loss_fn, dropinf.Dropout(4))
    for loss, error, message in (
        (inside, KeyError, "half way"),
        (failing, KeyError, "half way"),
        (poisoned, ValueError, r"of sample [456] is not finite"),
    ):
        wrapped, never_compressed = (wrap(kind, copy.deepcopy(plain)) for _ in range(2))
        with pytest.raises(error, match=message):
            dropinf.compress(wrapped, data, loss, dropinf.Dropout(4))
        assert_close(dropinf.compress(wrapped, data, loss_fn, dropinf.Dropout(4)), expected)
        with pytest.raises(error, match=message):
            dropinf.compress(wrapped, data, loss, dropinf.Dropout(4))
        assert_same_step(wrapped, never_compressed, data[0])


def after_an_evaluation(kind: str, plain: nn.Module, data) -> None:
    """A forward without a backward leaves FSDP's root gathered, in other parameter objects."""
    expected = dropinf.compress(plain, data, loss_fn, dropinf.Dropout(4))
    wrapped, never_compressed = (wrap(kind, copy.deepcopy(plain)) for _ in range(2))
    earlier = dropinf.Compressor(wrapped, dropinf.Dropout(4), loss_fn)
    with torch.no_grad():
        wrapped(data[0][0])
    assert_close(earlier.compress(data), expected)
    with torch.no_grad():
        wrapped(data[0][0])
    assert_close(dropinf.Compressor(wrapped, dropinf.Dropout(4), loss_fn).compress(data), expected)
    assert_same_step(wrapped, never_compressed, data[0])


def uncovered_parameters(kind: str, data) -> None:
    """What no hook covers is right, or an error that names it; never a gradient that lacks a part."""
    for block, name in ((Borrowing, "2.child"), (Scaled, "2.scale")):
        torch.manual_seed(1)
        plain = nn.Sequential(nn.Embedding(11, 8), Block(), block(), nn.Flatten(), nn.Linear(40, 3))
        wrapped = wrap(kind, copy.deepcopy(plain))
        sketches = {"sketch": dropinf.Dropout(4)}
        if kind == "fsdp2":
            with pytest.raises(ValueError, match=f"layer {name}: the parameter is sharded .* in layers="):
                dropinf.compress(wrapped, data, loss_fn, **sketches)
            sketches["layers"] = ["2.other", "1.*"]
        assert_close(
            dropinf.compress(wrapped, data, loss_fn, **sketches), dropinf.compress(plain, data, loss_fn, **sketches)
        )
        assert_same_step(wrapped, wrap(kind, plain), data[0])


def before_the_first_step(plain: nn.Module, data) -> None:
    """Mixed precision takes its dtypes at the first forward, which may be the compressor's."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    wrapped, never_compressed = (wrap("fsdp2", copy.deepcopy(plain), mp_policy=policy) for _ in range(2))
    found = dropinf.compress(wrapped, data, loss_fn, dropinf.Dropout(4)).flat
    expected = dropinf.compress(plain, data, loss_fn, dropinf.Dropout(4)).flat
    assert float((found - expected).norm()) < 0.05 * float(expected.norm())
    assert_same_step(wrapped, never_compressed, data[0])


def main(kind: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    plain = make_model()
    never_compressed = wrap(kind, copy.deepcopy(plain))
    wrapped = wrap(kind, copy.deepcopy(plain))
    generator = torch.Generator().manual_seed(rank)
    data = [
        (torch.randint(0, 11, (n, 5), generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for n in (4, 3)
    ]
    step(wrapped, data[0])  # a model that has trained, with weights that have required gradients
    step(never_compressed, data[0])
    with torch.no_grad():
        for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
            p.copy_(whole(q.detach()))
    sketch = dropinf.Dropout(dim=4)
    before = [(p.requires_grad, p.grad, whole(p.detach()).clone()) for p in wrapped.parameters()]
    expected, found = (dropinf.compress(m, data, loss_fn, sketch) for m in (plain, wrapped))
    found.check_same_sketch(expected)
    torch.testing.assert_close(found.flat, expected.flat, rtol=1e-5, atol=1e-7)
    assert float(expected.flat.abs().sum()) > 0
    for p, (flag, grad, value) in zip(wrapped.parameters(), before, strict=True):
        assert p.requires_grad == flag
        assert p.grad is None
        assert grad is None
        assert torch.equal(whole(p.detach()), value)
    calibrated_in_parts(wrapped, plain)
    for a, b in zip(step(wrapped, data[1]), step(never_compressed, data[1]), strict=True):
        assert torch.equal(a, b)
    after_a_failure(kind, plain, data)
    after_an_evaluation(kind, plain, data)
    uncovered_parameters(kind, data)
    if kind == "fsdp2":
        before_the_first_step(plain, data)
    print(f"rank {rank} of {kind}: {found}", flush=True)
    # DDP's reducer must go before the process group that it uses.
    del wrapped, never_compressed
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
