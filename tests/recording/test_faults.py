"""What is wrong with a loop is an error that says what, or is refused."""

# ruff: noqa: PT012 (a loop of several statements is what raises)

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf

from .loops import mlp, vectors


class Loop:
    """A recorded loop of one step after the other."""

    def __init__(self, tmp_path, model: nn.Module | None = None, optimizer=None, **options) -> None:
        torch.manual_seed(0)
        self.model = mlp() if model is None else model
        self.optimizer = optimizer or torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        options = {"sketch": dropinf.Dropout(5)} | options
        self.run = dropinf.record(self.model, options.pop("sketch"), self.optimizer, out=tmp_path, **options)

    def loss(self, step: int = 0, named: bool = True) -> Tensor:
        x, y = vectors(step, 12)
        if named:
            self.run.samples(range(len(x)))
        return F.cross_entropy(self.model(x), y)

    def step(self, i: int = 0) -> None:
        self.optimizer.zero_grad()
        self.loss(i).backward()
        self.optimizer.step()


def test_a_forward_whose_samples_are_not_named(tmp_path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(RuntimeError, match=r"no forward was named by run.samples\(ids\)"), loop.run:
        loop.loss(named=False).backward()
        loop.optimizer.step()


def test_one_of_two_forwards_is_not_named(tmp_path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(dropinf.AttributionError, match=r"a forward that run.samples\(ids\) did not name"), loop.run:
        loop.loss().backward()
        loop.loss(1, named=False).backward()
        loop.optimizer.step()


def test_a_step_without_backward_and_a_second_step(tmp_path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(RuntimeError, match="nothing was backpropagated"), loop.run:
        loop.loss()
        loop.optimizer.step()
    loop = Loop(tmp_path / "two")
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) once"), loop.run:
        loop.step()
        loop.optimizer.step()


def test_gradients_that_are_left_of_the_step_before(tmp_path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(dropinf.AttributionError, match="zero_grad"), loop.run:
        loop.step()
        loop.loss(1).backward()
        loop.optimizer.step()


def test_a_penalty_on_weights(tmp_path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(dropinf.AttributionError, match="a penalty on weights"), loop.run:
        (loop.loss() + sum(p.square().sum() for p in loop.model.parameters())).backward()
        loop.optimizer.step()


def test_a_layer_that_is_used_beside_its_module(tmp_path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(dropinf.AttributionError, match=r"layer 0 .*a use of the parameter"), loop.run:
        (loop.loss() + F.linear(torch.ones(12), loop.model[0].weight).sum()).backward()
        loop.optimizer.step()


def test_parameters_that_are_not_in_the_optimizer(tmp_path) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"optimizer: it does not have the parameters of 0, 0\.bias, 2"):
        Loop(tmp_path, model, torch.optim.AdamW(model[3].parameters(), lr=1e-2))
    Loop(tmp_path, model, torch.optim.AdamW(model[3].parameters(), lr=1e-2), layers="3")


def test_a_model_that_is_compiled_as_a_whole(tmp_path) -> None:
    for compiled in (torch.compile(mlp(), backend="eager"), mlp()):
        if not hasattr(compiled, "_orig_mod"):
            compiled.compile(backend="eager")
        with pytest.raises(ValueError, match="compiled as a whole"):
            Loop(tmp_path, compiled)


@pytest.mark.parametrize("sketch", [dropinf.Gaussian(5), dropinf.SJLT(5), dropinf.Rademacher(5)])
def test_what_is_no_mask_gives_rows_and_no_trajectory(tmp_path, sketch) -> None:
    loop = Loop(tmp_path, sketch=sketch)
    with loop.run as run:
        loop.step()
    query = dropinf.Compressor.from_masks(run.masks, loop.model, losses).compress([vectors(1, 12)])
    assert dropinf.score(query, run, kind="tracin").values.shape == (6, 6)
    with pytest.raises(ValueError, match="mixes coordinates, and the optimizer acts on each alone"):
        dropinf.score(query, run, kind="adamw")


def test_an_optimizer_that_is_not_known_gives_rows_alone(tmp_path) -> None:
    model = mlp()
    for i, optimizer in enumerate(
        (torch.optim.RMSprop(model.parameters()), torch.optim.AdamW(model.parameters(), amsgrad=True))
    ):
        loop = Loop(tmp_path / str(i), model, optimizer)
        with loop.run as run:
            loop.step()
        query = dropinf.Compressor.from_masks(run.masks, model, losses).compress([vectors(1, 12)])
        with pytest.raises(ValueError, match=r"RMSprop is none of|AdamW has amsgrad=True"):
            dropinf.score(query, run, kind="adamw")


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_queries_of_other_weights_masks_or_kinds(tmp_path) -> None:
    loop = Loop(tmp_path)
    with loop.run as run:
        loop.step()
    compressor = dropinf.Compressor.from_masks(run.masks, loop.model, losses)
    query = compressor.compress([vectors(1, 12)])
    other = dropinf.Compressor(loop.model, dropinf.Dropout(5, seed=9), losses).compress([vectors(1, 12)])
    with pytest.raises(ValueError, match="query and run differ"):
        dropinf.score(other, run, kind="adamw")
    with torch.no_grad():
        loop.model[0].weight.add_(1)
    with pytest.raises(ValueError, match="query and run are of different models"):
        dropinf.score(compressor.compress([vectors(1, 12)]), run, kind="adamw")
    dropinf.score(compressor.compress([vectors(1, 12)]), run, kind="adamw", other_model=True)
    for options, message in (
        ({"kind": "influence"}, "kind must be 'adamw' or 'tracin'"),
        ({"kind": "adamw", "window": -1}, "window is -1"),
        ({"kind": "adamw", "gamma": float("nan")}, "gamma is nan"),
        ({"kind": "adamw", "top": 3}, "takes no fisher, top, by, sources, out or group"),
        ({"kind": "adamw", "by": "layer"}, "takes no fisher, top, by, sources, out or group"),
        ({"kind": "tracin", "window": 2}, "are of kind='adamw'"),
        ({"kind": "adamw", "reduce": "max"}, "reduce must be 'mean' for a recorded run"),
    ):
        with pytest.raises(ValueError, match=message):
            dropinf.score(query, run, **options)
    with pytest.raises(TypeError, match="window, which are of recorded runs"):
        dropinf.score(query, query, kind="dot", window=1)


@pytest.mark.parametrize("n", [1, 5, 7, 12])
def test_more_or_fewer_ids_than_samples(tmp_path, n: int) -> None:
    loop = Loop(tmp_path)
    x, y = vectors(0, 12)
    with pytest.raises(dropinf.AttributionError, match=r"samples of run\.samples"), loop.run as run:
        run.samples(range(n))
        F.cross_entropy(loop.model(x), y).backward()
        loop.optimizer.step()


def test_samples_that_meet(tmp_path) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return self.two(x - x.mean(0))

    for name, model in (
        ("centred", Centred()),
        ("norm", nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))),
    ):
        loop = Loop(tmp_path / name, model)
        with pytest.raises(dropinf.AttributionError, match="belongs to several samples"), loop.run:
            loop.step()
        loop = Loop(tmp_path / f"{name} allowed", model, mixing=True)
        with loop.run as run:
            loop.step()
        assert len(run) == 1


def test_gradients_that_are_clipped_one_by_one(tmp_path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(dropinf.AttributionError, match=r"changed between backward and optimizer\.step"), loop.run:
        loop.loss().backward()
        nn.utils.clip_grad_value_(loop.model.parameters(), 1e-3)
        loop.optimizer.step()


def test_gradients_that_are_made_larger(tmp_path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(dropinf.AttributionError, match="multiplied by 3 between"), loop.run:
        loop.loss().backward()
        for p in loop.model.parameters():
            p.grad.mul_(3)
        loop.optimizer.step()


def test_a_scaler_that_is_not_passed(tmp_path) -> None:
    loop = Loop(tmp_path)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="scaler: a GradScaler makes the step"), loop.run:
        scaler.scale(loop.loss()).backward()
        scaler.step(loop.optimizer)


def test_a_step_that_a_scaler_skips_is_no_step(tmp_path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    loop = Loop(tmp_path, scaler=scaler)
    with loop.run as run:
        for i in range(4):
            loop.optimizer.zero_grad()
            loss = loop.loss(i) * (float("inf") if i == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(loop.optimizer)
            scaler.update()
    assert len(run) == 3
    assert int(loop.optimizer.state[loop.model[0].weight]["step"]) == 3


def test_a_loss_that_is_not_finite(tmp_path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(dropinf.AttributionError, match="not finite"), loop.run:
        (loop.loss() * float("nan")).backward()
        loop.optimizer.step()


def test_what_is_not_recordable_is_skipped_and_said(tmp_path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(12, 5), nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    with pytest.warns(UserWarning, match="scale"):
        loop = Loop(tmp_path, Mixed())
    assert "no hook covers its kind of module" in loop.run.skipped["scale"]
    with loop.run as run:
        loop.step()
    assert list(run.shapes) == ["inner", "inner.bias"]


def test_calls_outside_of_the_with_block(tmp_path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(RuntimeError, match="it is not recording"):
        loop.run.samples([1])
    with loop.run as run:
        with pytest.raises(ValueError, match="ids: it is empty"):
            run.samples([])
        with pytest.raises(ValueError, match=r"share has shape .2."):
            run.samples([1, 2, 3], share=[0.5, 0.5])
        with pytest.raises(ValueError, match="cu_seqlens has 2 bounds"):
            run.samples([1, 2, 3], cu_seqlens=torch.tensor([0, 5]))
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            run.losses(torch.ones(3))
        loop.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.optimizer.zero_grad()
        loop.loss(named=False).backward()
        loop.optimizer.step()  # as before: no hook is left
    assert not loop.model._forward_hooks
    assert not loop.model[0]._forward_hooks
    assert len(run) == 1


def test_damaged_and_missing_runs(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no recorded run"):
        dropinf.Run(tmp_path / "none")
    loop = Loop(tmp_path)
    with loop.run as run:
        loop.step()
        loop.step(1)
    query = dropinf.Compressor.from_masks(run.masks, loop.model, losses).compress([vectors(1, 12)])
    file = tmp_path / "steps-0.bin"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="step 1 is damaged"):
        dropinf.score(query, dropinf.Run(tmp_path), kind="adamw")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="not of a recorded run"):
        dropinf.Run(tmp_path)
