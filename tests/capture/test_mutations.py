"""Faults planted in capture: each gives wrong rows, and the audit sees it on the first batch where it acts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropinf
from dropinf.capture import audit
from dropinf.capture.ladder import AttributionError
from dropinf.capture.moments import Moments
from dropinf.capture.passes import Pass
from dropinf.capture.proof import Proof
from tests.api.oracle import oracle, sketched
from tests.capture import mutants_direct, mutants_hooks, mutants_ops, mutants_samples
from tests.capture.mutants import FAULTS, Fault, around
from tests.capture.mutants_models import N, build, cu_seqlens, loss_fn, singles

pytestmark = pytest.mark.filterwarnings("ignore:layers")  # slow rungs
RIGHT, WRONG = 1e-8, 2e-6  # relative errors; what the audit lets pass in float64 lies between


@dataclass
class Result:
    """What a call gave. ``errors``: the largest relative error of a row of each batch; ``seen``: the first batch, from
    0, that an audit found wrong; ``anew``: whether layouts were then found anew for it; ``rungs``: at the
    end; ``refused``: in which batch, if it was, with ``message``."""

    errors: list[float] = field(default_factory=list)
    seen: int | None = None
    anew: bool = False
    rungs: dict[str, str] = field(default_factory=dict)
    refused: int | None = None
    message: str = ""


@functools.cache
def known(model: str) -> tuple[nn.Module, list[Any], list[dict[str, Tensor]]]:
    """A model, its batches, and the gradients of each batch by the oracle."""
    built, batches = build(model)
    found = []
    for batch in batches:
        rows = [oracle(built, loss_fn, one, 1) for one in singles(batch)]
        found.append({name: torch.cat([r[name] for r in rows]) for name in rows[0]})
    return built, batches, found


def compressor_of(fault: Fault, when: str) -> dropinf.Compressor:
    route = {"*": fault.route} if fault.route else None
    model, cu = known(fault.model)[0], cu_seqlens(fault.model)
    return dropinf.Compressor(model, fault.sketch, loss_fn, cu_seqlens=cu, audit=when, route=route)


def run(fault: Fault, when: str, patch: pytest.MonkeyPatch | None) -> Result:
    """Compress a fault's batches, with the fault where there is a monkeypatch to plant it with."""
    _, batches, wanted = known(fault.model)
    compressor, result, taken = compressor_of(fault, when), Result(), []

    def given() -> Iterator[Any]:
        for batch in batches[: fault.acts + 2]:
            taken.append(len(singles(batch)))
            yield batch

    def coloured(old: Any, *args: Any, **options: Any) -> None:
        result.anew |= result.seen == len(taken) - 1
        old(*args, **options)

    def spy(wrong: Any, proof: Proof, *args: Any) -> dict[str, float]:
        found = wrong(proof, *args)
        if found and result.seen is None:
            result.seen = len(taken) - 1
        return found

    with pytest.MonkeyPatch.context() as watch:
        if patch is not None:
            fault.plant(patch)
        around(watch, Proof, "wrong", spy)
        around(watch, Pass, "coloured_backward", coloured)
        try:
            flat = compressor.compress(given()).flat
        except AttributionError as error:
            result.refused, result.message = len(taken) - 1, str(error)
            return result
        finally:
            result.rungs = dict(compressor._sweep.ladder.rungs)
    for rows, gradients in zip(flat.split(taken), wanted, strict=False):
        want = {n: sketched(layer, gradients[layer.parameter]) for n, layer in compressor.layers.items()}
        apart = rows - torch.cat([w.flatten(1) for w in want.values()], 1)
        size = torch.cat([w.flatten(1).norm().expand_as(w).flatten(1) for w in want.values()], 1)
        result.errors.append(float((apart / size.clamp_min(1e-12)).norm(dim=1).max()))
    return result


@functools.cache
def clean(setting: tuple[Any, ...]) -> Result:
    """What a setting gives without a fault, every batch audited. Not to be called first with a fault planted."""
    model, route, sketch = setting
    return run(Fault("none", model, print, route=route, sketch=sketch, acts=99), "every", None)


def test_there_are_enough():
    assert len(FAULTS) == len({f.name for f in FAULTS}) >= 90
    for module in (mutants_direct, mutants_hooks, mutants_ops, mutants_samples):
        assert any(f.plant.__module__ == module.__name__ for f in FAULTS)


@pytest.mark.parametrize("setting", sorted({f.setting for f in FAULTS}, key=repr), ids=str)
def test_without_a_fault_no_audit_objects(setting):
    model, route, sketch = setting
    for when in ("every", "never"):
        found = run(Fault("none", model, print, route=route, sketch=sketch, acts=99), when, None)
        assert max(found.errors) < RIGHT
        assert found.seen is None
        assert found.rungs == clean(setting).rungs
        assert set(found.rungs.values()) <= {route or "hook", "op"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_the_fault_gives_wrong_rows(fault, monkeypatch):
    found = run(fault, "never", monkeypatch)
    assert all(error < RIGHT for error in found.errors[: fault.acts])
    assert found.errors[fault.acts] > WRONG


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_the_audit_sees_it(fault, monkeypatch):
    without = clean(fault.setting)
    found = run(fault, fault.audit, monkeypatch)
    assert all(error < RIGHT for error in found.errors), f"wrong rows: {found.errors}"
    assert found.seen == fault.acts
    if fault.refused:
        assert found.refused == fault.acts
        assert found.message.startswith("layer ")
    else:
        assert found.refused is None
        assert found.rungs != without.rungs or (fault.heals and found.anew)


def test_a_fault_of_a_later_call_is_seen_on_its_fourth_batch(monkeypatch):
    model, batches, _ = known("many_batches")
    compressor = dropinf.Compressor(model, dropinf.Dropout(5), loss_fn)
    compressor.compress(batches[:6])
    fault = next(f for f in FAULTS if f.name == "fourth_batch_alone")
    fault.plant(monkeypatch)
    with pytest.raises(
        dropinf.AttributionError, match="those of the 5 batches before, which were found in the same way"
    ):
        compressor.compress(batches[:4])
    monkeypatch.undo()
    torch.testing.assert_close(
        compressor.compress(batches[:4]).flat,
        dropinf.Compressor(model, dropinf.Dropout(5), loss_fn).compress(batches[:4]).flat,
    )


# Calibration: its moments, not rows, are what a fault makes wrong.


def moments_of(model: str, sketch: dropinf.Sketch, when: str, route: Any = None) -> tuple[dict, dict]:
    """What calibration on the first batches finds of each layer, and the rungs then."""
    built, batches, _ = known(model)
    compressor = dropinf.Compressor(built, sketch, loss_fn, audit=when, route=route)
    compressor.calibrate(batches[:4])
    found = {f"{n} {side}": m for n in compressor.layers for side, m in compressor.moments(n).items()}
    return found, dict(compressor._sweep.ladder.rungs)


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    assert found
    return max(float((m - wanted[n]).norm() / wanted[n].norm().clamp_min(1e-12)) for n, m in found.items())


CALIBRATION = {
    "gradient_doubled": "auto",
    "second_call_lost": "auto",
    "norm_of_an_input_that_is_not_normalised": "auto",
    "norm_without_its_epsilon": "auto",
    "convolution_padded_with_zeros": "auto",
    "hook_behind_those_of_the_user": "auto",
    "norm_by_the_statistics_of_the_batch": "auto",
    "tap_doubles_what_it_passes_on": "auto",
    "mapped_rows_doubled": "auto",
    "batch_that_needs_no_colours_doubled": "every",
}
SKETCHES = [dropinf.PCA(3), dropinf.Dropout(3, sampling="energy")]


@pytest.mark.parametrize("sketch", SKETCHES, ids=["pca", "energy"])
@pytest.mark.parametrize("name", CALIBRATION)
def test_a_fault_while_calibrating_is_seen(name, sketch, monkeypatch):
    fault = next(f for f in FAULTS if f.name == name)
    model = "raw" if fault.route else fault.model
    right, before = moments_of(model, sketch, "never")
    fault.plant(monkeypatch)
    wrong, _ = moments_of(model, sketch, "never")
    found, rungs = moments_of(model, sketch, CALIBRATION[name])
    monkeypatch.undo()
    assert largest_difference(wrong, right) > WRONG
    assert fault.heals or rungs != before, "unseen"
    assert largest_difference(found, moments_of(model, sketch, "never", rungs)[0]) < RIGHT


@pytest.mark.parametrize("sketch", SKETCHES, ids=["pca", "energy"])
@pytest.mark.parametrize("factor", [1, 2])
def test_moments_are_those_of_inputs_and_of_output_gradients(sketch, factor, monkeypatch):
    """No audit of rows sees a fault in how moments add up: here, sums that are ``factor`` times too large."""
    around(monkeypatch, Moments, "add", lambda old, moments, layer, side, x: old(moments, layer, side, factor * x))
    found, _ = moments_of("squares", sketch, "auto")
    model, (x,), (gradients,) = known("squares")
    wanted = {}
    for i, module in enumerate(model):
        if isinstance(module, nn.Linear):
            g = gradients[f"{i}.bias"]  # of its output, as each sample is one row
            wanted |= {f"{i} in": x.T @ x / N, f"{i} out": g.T @ g / N, f"{i}.bias out": g.T @ g / N}
        x = module(x).detach()
    wanted = {n: wanted[n] if m.ndim == 2 else wanted[n].diagonal() for n, m in found.items()}
    assert largest_difference(found, wanted) == pytest.approx(factor - 1, abs=RIGHT)


# The audit itself, broken.


def test_an_audit_that_finds_nothing_lets_every_fault_pass():
    passed = []
    for fault in FAULTS:
        with pytest.MonkeyPatch.context() as patch:
            fault.plant(patch)
            patch.setattr(Proof, "wrong", lambda *_: {})
            if max(run(replace(fault, plant=print), fault.audit, None).errors) > WRONG:
                passed.append(fault.name)
    assert len(passed) == len(FAULTS) >= 90


@pytest.mark.parametrize(
    "name", ["two_samples_averaged", "mapped_rows_shifted_by_one_sample", "rows_alone_shifted_by_one_sample"]
)
def test_an_audit_without_random_weights_does_not_see_exchanged_samples(name, monkeypatch):
    monkeypatch.setattr(audit, "random_weights", lambda losses, *_: torch.ones_like(losses))
    found = run(next(f for f in FAULTS if f.name == name), "every", monkeypatch)
    assert found.seen is None
    assert max(found.errors) > WRONG
