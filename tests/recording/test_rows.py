"""Rows of a recorded run are each sample's part of the step's gradient, and recording changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

import dropinf
from tests.api.oracle import sketched

from .loops import CASES, GPT, SAMPLES, Case, ids_of, next_word, oracle, text, train

SKETCHES = {
    "factorized": dropinf.Dropout(5, seed=3),
    "flat": dropinf.Dropout(5, mode="flat", seed=3),
    "runs": dropinf.Dropout(8, group=4, seed=3),
    "whole": dropinf.Identity(),
    "gaussian": dropinf.Gaussian(5, seed=3),
}
OFTEN = ("factorized", "flat")
pytestmark = pytest.mark.filterwarnings("ignore:model. places are not recorded")
SLACK = {"autocast": 3e-2, "autocast, scaled": 1e-3}


@pytest.mark.parametrize(
    "sketch", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.more) for name in SKETCHES]
)
@pytest.mark.parametrize("name", CASES)
def test_rows_are_each_samples_part_of_the_step(name: str, sketch: str, tmp_path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    models = [copy.deepcopy(model)]
    steps = 9
    run, _ = train(
        case, model, steps, out=tmp_path, sketch=SKETCHES[sketch], before=lambda _: models.append(copy.deepcopy(model))
    )
    layers = run._layers
    shared = {"places.weight"} if isinstance(model, GPT) else set()  # a table of all samples
    assert {layer.parameter for layer in layers.values()} == {n for n, _ in model.named_parameters()} - shared
    assert set(run.skipped) == {name.removesuffix(".weight") for name in shared}
    assert len(run) == steps
    for step in range(steps):
        assert run.ids(step) == [x for i in range(case.micro) for x in ids_of(step, i)]
        want = [
            torch.cat([sketched(layer, part[layer.parameter]).flatten(1) for layer in layers.values()], 1)
            for part in oracle(case, models[step + 1], step)
        ]
        got, expected = run.rows(step).double(), torch.cat(want)
        assert got.shape == expected.shape == (SAMPLES * case.micro, sum(run.columns.widths))
        begin = 0
        for layer, width in zip(layers.values(), run.columns.widths, strict=True):
            one, other = (x[:, begin : begin + width] for x in (got, expected))
            begin += width
            error = (one - other).norm() / other.norm().clamp_min(1e-5 * expected.norm())
            assert error <= SLACK.get(name, 1e-4), f"{layer.name}: {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_recording_changes_no_bit_of_the_training(name: str, tmp_path) -> None:
    case = CASES[name]
    if case.model is GPT:
        case = Case(**{**vars(case), "model": lambda: GPT(dropout=0.2)})
    finals = []
    for out in (None, tmp_path):
        torch.manual_seed(0)
        model = case.model()
        _, optimizer = train(case, model, 50, out=out, sketch=dropinf.Dropout(5))
        state = [x for s in optimizer.state.values() for x in s.values()]
        finals.append([*model.parameters(), *(x for x in state if isinstance(x, torch.Tensor)), torch.rand(3)])
    assert all(map(torch.equal, *finals))


def test_rows_equal_those_of_a_compressor_at_each_steps_weights(tmp_path) -> None:
    torch.manual_seed(0)
    model, models = GPT(), []
    run, _ = train(
        CASES["gpt"],
        model,
        5,
        out=tmp_path,
        sketch=dropinf.Dropout(5),
        before=lambda _: models.append(copy.deepcopy(model)),
    )
    for step, then in enumerate(models):
        compressor = dropinf.Compressor.from_masks(run.masks, then, next_word_losses)
        want = compressor.compress([text(step)]).flat / SAMPLES
        torch.testing.assert_close(run.rows(step), want, rtol=1e-4, atol=1e-6)


def next_word_losses(model, ids):
    return next_word(model, ids) * len(ids)


@pytest.mark.parametrize("name", [n for n in CASES if n != "muon"])
def test_the_trajectory_from_gradients_is_the_optimizers(name: str, tmp_path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    steps = 70  # over the end of a segment
    run, optimizer = train(case, model, steps, out=tmp_path, sketch=dropinf.Dropout(5))
    named = dict(model.named_parameters())
    for i, kept in enumerate(run.state(steps)):
        state = ("momentum_buffer",) if run.kind == "sgd" else ("exp_avg", "exp_avg_sq")
        want = [
            layer.compress_exact(optimizer.state[named[layer.parameter]][state[i]][None]).flatten()
            for layer in run._layers.values()
        ]
        want = torch.cat(want).double()
        assert (kept - want).norm() <= 1e-5 * want.norm()
