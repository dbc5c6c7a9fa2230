"""What is done beside the loop's own steps is seen: to weights, the optimizer's state and settings, and the files."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf
from dropinf.recording.adjoint import through_clipping

N = 6
ADAMW = lambda p: torch.optim.AdamW(p, lr=1e-2)  # noqa: E731
FAST = lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.1, 0.5))  # noqa: E731
PLAIN = lambda p: torch.optim.SGD(p, lr=1e-2)  # noqa: E731
HEAVY = lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.5, nesterov=True, weight_decay=0.1)  # noqa: E731


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 5))


def step(model: nn.Module, optimizer: Any, run: Any, at: int) -> None:
    generator = torch.Generator().manual_seed(at)
    x, y = torch.randn(N, 7, generator=generator), torch.randint(0, 5, (N,), generator=generator)
    optimizer.zero_grad()
    run.samples(range(N))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def trained(out: Any, make: Callable, beside: Callable, steps: int = 5, **options: Any) -> dropinf.Recording:
    """A run with something done behind each step."""
    model = small()
    optimizer = make(model.parameters())
    with dropinf.record(model, dropinf.Dropout(4), optimizer, out=out, **options) as run:
        for at in range(steps):
            step(model, optimizer, run, at)
            with torch.no_grad():
                beside(at, model, optimizer)
    return run


@torch.no_grad()
def halve(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(0.5)


BESIDE: dict[str, Callable[[int, nn.Module, Any], Any]] = {
    "shrunk": lambda _at, m, _o: [p.mul_(0.99) for p in m.parameters()],
    "clamped": lambda _at, m, _o: [p.clamp_(-0.1, 0.1) for p in m.parameters()],
    "clamped by a hook": lambda at, m, o: at == 1 and o.register_step_post_hook(lambda *_: halve(m)),
    "shrunk at the end": lambda at, m, _o: at == 4 and halve(m),
    "a layer made anew": lambda at, m, _o: at == 2 and m[0].reset_parameters(),
    "another optimizer": lambda _at, m, _o: torch.optim.SGD(m.parameters(), lr=1e-2).step(),
    "a rate that a hook sets": lambda at, _m, o: (
        at == 1 and o.register_step_pre_hook(lambda *_: o.param_groups[0].update(lr=1e-3))
    ),
}


@pytest.mark.parametrize("make", [ADAMW, PLAIN, HEAVY], ids=["adamw", "sgd", "nesterov"])
@pytest.mark.parametrize("name", BESIDE)
def test_weights_that_are_changed_beside_the_steps(name: str, make: Callable, tmp_path) -> None:
    with pytest.raises(ValueError, match="not where the recorded steps lead"):
        trained(tmp_path, make, BESIDE[name])


@pytest.mark.parametrize("make", [FAST, HEAVY], ids=["adamw", "nesterov"])
def test_a_state_that_is_forgotten_on_the_way(make: Callable, tmp_path) -> None:
    with pytest.raises(ValueError, match="not where the recorded steps lead"):
        trained(tmp_path, make, lambda at, _m, o: at == 1 and o.state.clear(), steps=40)


@pytest.mark.parametrize("make", [ADAMW, FAST, PLAIN, HEAVY], ids=["adamw", "fast", "sgd", "nesterov"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_alone_are_where_they_lead(make: Callable, dtype: torch.dtype, tmp_path) -> None:
    model = small().to(dtype)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    with dropinf.record(model, dropinf.Dropout(4), optimizer, out=tmp_path) as run:
        for at in range(40):
            optimizer.zero_grad()
            run.samples(range(N))
            x = torch.randn(N, 7, generator=torch.Generator().manual_seed(at)).to(dtype)
            F.cross_entropy(model(x).float(), torch.arange(N) % 5).backward()
            optimizer.step()
            schedule.step()
    assert len(run) == 40


def test_groups_with_and_without_momentum(tmp_path) -> None:
    model = small()
    groups = [{"params": model[0].parameters(), "momentum": 0.9}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=1e-2)
    with dropinf.record(model, dropinf.Dropout(4), optimizer, out=tmp_path) as run:
        for at in range(5):
            step(model, optimizer, run, at)
    assert len(run) == 5


def test_a_run_goes_on_from_its_own_weights_alone(tmp_path) -> None:
    model = small()
    optimizer = ADAMW(model.parameters())
    with dropinf.record(model, dropinf.Dropout(4), optimizer, out=tmp_path) as run:
        for at in range(3):
            step(model, optimizer, run, at)
    halve(model)
    recording = dropinf.record(model, dropinf.Dropout(4), optimizer, out=tmp_path)
    with pytest.raises(ValueError, match="not where the recorded steps lead"), recording as run:
        step(model, optimizer, run, 3)


def test_maximize_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="maximize=True"):
        trained(tmp_path, lambda p: torch.optim.SGD(p, lr=1e-2, maximize=True), lambda *_: None)


def test_a_fused_optimizers_scaler_is_asked_for(tmp_path) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with dropinf.record(model, dropinf.Dropout(4), optimizer, out=tmp_path) as run:
        run.samples(range(N))
        scaler.scale(F.cross_entropy(model(torch.randn(N, 7)), torch.arange(N) % 5)).backward()
        with pytest.raises(ValueError, match="scaler: a GradScaler makes the step"):
            scaler.step(optimizer)


def test_tables_that_a_forward_shortens_are_left_as_trained(tmp_path) -> None:
    finals = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(11, 6, max_norm=1.0), nn.Linear(6, 6))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        recording = dropinf.record(model, dropinf.Dropout(4), optimizer, out=tmp_path) if recorded else None
        with recording or torch.enable_grad():
            for at in range(20):
                ids = torch.randint(0, 11, (5, 3), generator=torch.Generator().manual_seed(at))
                optimizer.zero_grad()
                if recording is not None:
                    recording.samples(range(5))
                model(ids).pow(2).mean().backward()
                optimizer.step()
        finals.append([p.detach().clone() for p in model.parameters()])
    assert recording.skipped == {"0": "its forward changes it (max_norm)"}
    assert all(map(torch.equal, *finals))


@pytest.mark.parametrize("damage", ["cut", "swapped", "written twice", "one missing"])
def test_steps_that_are_not_those_that_were_written(damage: str, tmp_path) -> None:
    run = trained(tmp_path / "run", ADAMW, lambda *_: None)
    file = tmp_path / "run" / "steps-0.bin"
    data = file.read_bytes()
    bounds = [0, *(at + length for at, length in run._files[0]._places)]
    parts = [data[a:b] for a, b in itertools.pairwise(bounds)]
    changed = {
        "cut": parts[:3],
        "swapped": [parts[0], parts[2], parts[1], *parts[3:]],
        "written twice": [*parts[:2], parts[1], *parts[3:]],
        "one missing": [*parts[:2], *parts[3:], parts[4]],
    }[damage]
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    (tmp_path / "other" / "steps-0.bin").write_bytes(b"".join(changed))
    model = small()
    query = dropinf.Compressor.from_masks(run.masks, model, lambda m, x: m(x).sum(1)).compress([torch.randn(2, 7)])
    with pytest.raises(ValueError, match="restore a copy"):
        dropinf.score(query, dropinf.Run(tmp_path / "other"), kind="adamw", other_model=True)


@pytest.mark.parametrize("bad", [float("nan"), -1.0, float("inf")])
def test_losses_that_are_none(bad: float, tmp_path) -> None:
    model = small()
    with dropinf.record(model, dropinf.Dropout(4), ADAMW(model.parameters()), out=tmp_path) as run:
        run.samples(range(N))
        model(torch.randn(N, 7))
        with pytest.raises(ValueError, match="losses has a number"):
            run.losses(torch.full((N,), bad))


def test_drawn_losses_of_another_graph(tmp_path) -> None:
    model = small()
    with dropinf.record(model, dropinf.Dropout(4), ADAMW(model.parameters()), out=tmp_path) as run:
        run.samples(range(N))
        model(torch.randn(N, 7))
        with pytest.raises(ValueError, match="drawn: no gradient"):
            run.drawn(torch.ones((), requires_grad=True) * 2)


def test_clipping_by_the_norm_of_more_than_is_recorded() -> None:
    """The adjoint of a part of a gradient that is clipped as a whole, against autograd."""
    torch.manual_seed(0)
    whole = torch.randn(9, dtype=torch.float64).requires_grad_(True)
    want = torch.randn(2, 4, dtype=torch.float64)

    def clipped(x: Tensor) -> Tensor:
        return x * (0.7 / (x.norm() + 1e-6))

    after = clipped(whole)
    truth = torch.stack([torch.autograd.grad(after[:4] @ w, whole, retain_graph=True)[0][:4] for w in want])
    factor, norm = float(0.7 / (whole.norm() + 1e-6)), float(whole.norm())
    found = through_clipping(want, factor, after[:4].detach(), torch.ones(4).double(), norm)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize(
    "ids", [5, "abcdef", set(range(N)), [None] * N, [object() for _ in range(N)], torch.zeros(N, 2)]
)
def test_ids_that_name_no_samples(ids: Any, tmp_path) -> None:
    model = small()
    with dropinf.record(model, dropinf.Dropout(4), ADAMW(model.parameters()), out=tmp_path) as run:
        with pytest.raises(TypeError, match="ids "):
            run.samples(ids)
        step(model, run.optimizer, run, 0)
    assert run.ids(0) == [str(i) for i in range(N)]


def test_a_table_of_sparse_gradients_is_left_out(tmp_path) -> None:
    model = nn.Sequential(nn.Embedding(11, 6, sparse=True), nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dropinf.record(model, dropinf.Dropout(4), optimizer, out=tmp_path) as run:
        for at in range(3):
            optimizer.zero_grad()
            run.samples(range(5))
            model(torch.randint(0, 11, (5, 3), generator=torch.Generator().manual_seed(at))).pow(2).mean().backward()
            optimizer.step()
    assert run.skipped == {"0": "its gradient is sparse"}


@pytest.mark.parametrize("place", [30, 34, 60])
def test_a_step_that_cannot_be_read(place: int, tmp_path) -> None:
    run = trained(tmp_path, ADAMW, lambda *_: None)
    file = tmp_path / "steps-0.bin"
    data = bytearray(file.read_bytes())
    data[place] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        dropinf.Run(tmp_path).drawn_at(1)
    with pytest.raises(ValueError, match="damaged"):
        run.rows(0)


class Noisy(nn.Module):
    """Draws from generators of its own, which count what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.own, self.old = nn.Linear(7, 5), np.random.default_rng(0), np.random.RandomState(0)
        self.pythons = [random.Random(0)]

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.own.random() + self.old.rand() + self.pythons[0].random()
        return self.one(x * drawn)


def test_generators_that_a_model_holds_are_left_as_its_forwards_leave_them(tmp_path) -> None:
    finals = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = Noisy()
        optimizer = ADAMW(model.parameters())
        recording = dropinf.record(model, dropinf.Dropout(4), optimizer, out=tmp_path) if recorded else None
        with recording or torch.enable_grad():
            for at in range(6):
                optimizer.zero_grad()
                if recording is not None:
                    recording.samples(range(N))
                x = torch.randn(N, 7, generator=torch.Generator().manual_seed(at))
                F.cross_entropy(model(x), torch.arange(N) % 5).backward()
                optimizer.step()
        finals.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *finals))


def test_generators_of_a_model_are_wound_back_for_each_batch() -> None:
    torch.manual_seed(0)
    model = Noisy()
    compressor = dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x).square().sum(1))
    first = compressor.compress([torch.ones(N, 7)] * 3).flat
    torch.testing.assert_close(compressor.compress([torch.ones(N, 7)] * 3).flat, first)
