"""Refined directions equal a dense solve in float64, whatever the curvature, the start and the preconditioner."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropinf
from dropinf.directions.preconditioner import Preconditioner
from tests.directions import dense
from tests.directions.dense import of_direction, work

MODELS = ("mlp", "conv", "gpt")
KINDS = ("fisher", "gauss-newton")


def solved(found, kind, damping):
    c = dense.curvature(found, kind)
    b = dense.gradients(found.model, found.loss_fn, found.queries)
    return torch.linalg.solve(c + damping * torch.eye(len(c)).double(), b.T).T


def refine(found, kind, **options):
    given = found.options if kind == "gauss-newton" else {}
    return dropinf.refine(found.model, found.queries, found.batches, found.loss_fn, **given, **options)


def assert_close(found, expected, tolerance=1e-6):
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert bool((error <= tolerance).all()), error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_dense_solve(name, kind):
    found = work(name)
    refined = refine(found, kind, damping=0.1, steps=300, tolerance=1e-9)
    assert_close(of_direction(refined.direction, found.model), solved(found, kind, refined.damping))
    assert refined.residuals.shape[1] == dense.QUERIES
    assert bool((refined.residuals[0] == 1).all())
    assert bool((refined.residuals[-1] <= 1e-9).all())


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_are_those_of_the_damped_system(kind):
    found = work("gpt")
    refined = refine(found, kind, damping=3.0, steps=2)
    c, x = dense.curvature(found, kind), of_direction(refined.direction, found.model)
    b = dense.gradients(found.model, found.loss_fn, found.queries)
    left = b - x @ c - refined.damping * x
    torch.testing.assert_close(refined.residuals[-1], left.norm(dim=1) / b.norm(dim=1), rtol=1e-8, atol=1e-12)
    assert len(refined.residuals) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_diagonal_is_near_the_trace(kind):
    found = work("gpt")
    refined = refine(found, kind, damping=1.0, steps=0)
    mean = float(dense.curvature(found, kind).diagonal().mean())
    assert refined.damping == pytest.approx(mean, rel=0.3)
    assert refine(found, kind, damping=0.125, absolute=True, steps=0).damping == 0.125


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sketch", [dropinf.Identity(), dropinf.Dropout(4)], ids=repr)
def test_a_preconditioner_and_a_start_change_the_way_and_not_the_end(sketch, kind):
    found = work("mlp")
    compressor = dropinf.Compressor(found.model, sketch, found.loss_fn)
    fisher = dropinf.build_fisher(compressor.compress(found.batches), "joint", 0.1)
    start = dropinf.direction(compressor.compress(found.queries), fisher, compressor)
    refined = refine(
        found, kind, damping=0.1, steps=300, tolerance=1e-9, start=start, precondition=(fisher, compressor)
    )
    assert_close(of_direction(refined.direction, found.model), solved(found, kind, refined.damping))
    assert bool((refined.residuals[0] != 1).all())


def test_the_exact_fisher_as_a_preconditioner_needs_one_step():
    found = work("mlp")
    compressor = dropinf.Compressor(found.model, dropinf.Identity(), found.loss_fn)
    fisher = dropinf.build_fisher(compressor.compress(found.batches), "joint")
    refined = refine(found, "fisher", damping=0.01, steps=1, precondition=(fisher, compressor))
    assert bool((refined.residuals[1] < 1e-9).all())
    slow = refine(found, "fisher", damping=0.01, steps=1)
    assert bool((slow.residuals[1] > 0.05).all())


@pytest.mark.parametrize("sketch", [dropinf.Identity(), dropinf.Dropout(4)], ids=repr)
def test_a_preconditioner_is_the_inverse_on_the_mask_and_the_damping_beside_it(sketch):
    found, damping, scale = work("conv"), 0.3, 7.0
    compressor = dropinf.Compressor(found.model, sketch, found.loss_fn)
    fisher = dropinf.build_fisher(compressor.compress(found.batches), "joint")
    names = [name for name, _ in found.model.named_parameters()]
    r = {name: torch.randn(2, *p.shape).double() for name, p in found.model.named_parameters()}
    solved = Preconditioner(fisher, compressor, found.model, names).apply(r, damping, scale)
    kept = {name: torch.zeros(p.numel(), dtype=torch.bool) for name, p in found.model.named_parameters()}
    for layer in compressor.layers.values():
        kept[layer.parameter][layer.entries] = True
    mask = torch.cat(list(kept.values())).double()
    c = dense.curvature(found, "fisher") * mask * mask[:, None]
    system = scale * c + damping * torch.eye(len(c)).double()
    assert_close(dense.flat(solved), torch.linalg.solve(system, dense.flat(r).T).T, 1e-9)


def test_a_tolerance_below_what_the_dtype_holds_is_an_error():
    found = work("gpt")
    found.model.float()
    with pytest.raises(ValueError, match="float64 where rounding is the limit"):
        refine(found, "gauss-newton", damping=0.01, absolute=True, steps=300, tolerance=1.5e-7)


def test_queries_do_not_depend_on_each_other_or_on_their_batches():
    found = work("mlp")
    together = refine(found, "fisher", damping=0.1, steps=3)
    single = [tuple(x[q : q + 1] for x in b) for b in found.queries for q in range(len(b[0]))]
    for q, batch in enumerate(single):
        alone = refine(found._replace(queries=[batch]), "fisher", damping=together.damping, absolute=True, steps=3)
        assert_close(
            of_direction(alone.direction, found.model), of_direction(together.direction, found.model)[q : q + 1], 1e-12
        )


def test_float32_is_right_to_its_rounding():
    found = work("gpt")
    expected = solved(found, "gauss-newton", 0.01)
    found.model.float()
    refined = refine(found, "gauss-newton", damping=0.01, absolute=True, steps=100, tolerance=1e-4)
    assert_close(of_direction(refined.direction, found.model).double(), expected, 1e-3)


def test_an_op_without_forward_mode_goes_by_two_backwards():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return 3 * g * ctx.saved_tensors[0] ** 2

    class Layer(nn.Module):
        def forward(self, x):
            return Cube.apply(x)

    found = work("mlp")
    found.model[3] = Layer()
    for kind in KINDS:
        refined = refine(found, kind, damping=0.1, steps=300, tolerance=1e-9)
        found.model[3].forward = lambda x: x**3
        expected = solved(found, kind, refined.damping)
        del found.model[3].forward
        assert_close(of_direction(refined.direction, found.model), expected)


def test_a_query_may_have_a_loss_of_its_own():
    found = work("mlp")
    margin = lambda model, batch: model(batch[0])[:, 0]  # noqa: E731
    refined = dropinf.refine(
        found.model, found.queries, found.batches, found.loss_fn, query_loss=margin, steps=60, tolerance=1e-9
    )
    c = dense.curvature(found, "fisher")
    b = dense.gradients(found.model, margin, found.queries)
    expected = torch.linalg.solve(c + refined.damping * torch.eye(len(c)).double(), b.T).T
    assert_close(of_direction(refined.direction, found.model), expected)


def test_layers_that_are_not_named_are_left_out():
    found = work("mlp")
    refined = refine(found, "fisher", layers="4", damping=0.1, steps=60, tolerance=1e-9)
    assert set(refined.direction.parameters) == {"4.weight", "4.bias"}
    g = dense.gradients(found.model, found.loss_fn, found.batches)[:, -24:]
    b = dense.gradients(found.model, found.loss_fn, found.queries)[:, -24:]
    system = g.T @ g / len(g) + refined.damping * torch.eye(24).double()
    rows = [torch.cat([refined.direction.tensor(n, q).flatten() for n in ("4.weight", "4.bias")]) for q in range(3)]
    assert_close(torch.stack(rows), torch.linalg.solve(system, b.T).T)


def test_a_query_without_a_gradient_has_a_direction_of_zero():
    found = work("mlp")
    loss = lambda model, batch: found.loss_fn(model, batch) * (batch[1] * 0 + torch.tensor([0.0, 1.0])[: len(batch[1])])  # noqa: E731
    refined = dropinf.refine(
        found.model, found.queries[:1], found.batches, found.loss_fn, query_loss=loss, steps=60, tolerance=1e-8
    )
    x = of_direction(refined.direction, found.model)
    assert not x[0].any()
    assert x[1].any()
    assert not refined.residuals[:, 0].any()
