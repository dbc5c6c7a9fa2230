"""What refine refuses, and that the model is afterwards what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dropinf
from tests.directions.dense import cross_entropy, plain, work


def refine(found, **options):
    return dropinf.refine(found.model, found.queries, found.batches, found.loss_fn, **{"steps": 1} | options)


def _halved(outputs, batch):
    return cross_entropy(outputs, batch) / 2


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"damping": 0}, ValueError, "damping is 0; it must be a finite number above 0"),
        ({"damping": "auto"}, ValueError, "damping is 'auto'"),
        ({"steps": -1}, ValueError, "steps is -1"),
        ({"steps": 1.5}, ValueError, "steps is 1.5"),
        ({"tolerance": 0}, ValueError, "tolerance is 0"),
        ({"curvature": "hessian"}, ValueError, "curvature is 'hessian'; it must be one of fisher, gauss-newton"),
        ({"outputs_fn": plain}, ValueError, "outputs_fn is of curvature"),
        ({"curvature": "gauss-newton"}, TypeError, "outputs_fn must be a function"),
        ({"curvature": "gauss-newton", "outputs_fn": plain}, TypeError, "loss_of_outputs must be a function"),
        (
            {"curvature": "gauss-newton", "outputs_fn": plain, "loss_of_outputs": _halved},
            ValueError,
            "gives other losses than loss_fn",
        ),
        ({"query_loss": 3}, TypeError, "loss_fn must be a function"),
        ({"start": 3}, TypeError, "start must be a Direction"),
        ({"precondition": 3}, TypeError, r"precondition must be a pair \(Fisher, Compressor\)"),
        ({"layers": "nothing"}, ValueError, "nothing"),
        ({"query_loss": lambda model, batch: model(batch[0]).mean()}, ValueError, "shape"),
        ({"query_loss": lambda model, batch: model(batch[0]).sum(1).detach()}, ValueError, "without a gradient"),
        ({"query_loss": lambda model, batch: model(batch[0]).sum(1) * torch.inf}, ValueError, "query 0 is not finite"),
    ],
)
def test_bad_arguments_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        refine(work("mlp"), **options)


def test_batches_are_read_again():
    found = work("mlp")
    with pytest.raises(ValueError, match="batches: it is a generator, which can be read once"):
        refine(found._replace(batches=(b for b in found.batches)))
    with pytest.raises(ValueError, match="batches: it is empty"):
        refine(found._replace(batches=[]))
    with pytest.raises(ValueError, match="queries: it is empty"):
        refine(found._replace(queries=[]))


def test_batches_that_change_are_refused():
    found = work("mlp")

    class Noisy(list):
        def __iter__(self):
            return ((x + torch.randn_like(x), y) for x, y in super().__iter__())

    with pytest.raises(ValueError, match="batches: they are not those of an earlier pass"):
        refine(found._replace(batches=Noisy(found.batches)))


def test_a_model_that_is_trained_meanwhile_is_refused(tmp_path):
    found = work("mlp")

    class Training(list):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                with torch.no_grad():
                    found.model[0].bias += 1e-3

    with pytest.raises(ValueError, match="the model at the beginning and after a step are of different models"):
        refine(found._replace(batches=Training(found.batches)), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="'mark' of 0 was set between two batches"):
        refine(found._replace(batches=Marking(found.batches, found.model[0])))


class Marking(list):
    """Sets an attribute of a module between batches."""

    def __init__(self, batches, module):
        super().__init__(batches)
        self.module = module

    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            self.module.mark = 1


def test_another_start_is_refused():
    found, other = work("mlp"), work("mlp")
    compressor = dropinf.Compressor(found.model, dropinf.Dropout(3), found.loss_fn)
    start = dropinf.direction(compressor.compress(found.queries), None, compressor)
    with pytest.raises(ValueError, match="start: it is of 2 queries, and queries has 3"):
        refine(found, start=start[:2])
    with pytest.raises(ValueError, match=r"start: its parameter .* is not refined"):
        refine(found, start=start, layers="4")
    with torch.no_grad():
        other.model[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="start and model are of different models"):
        refine(other, start=start)


def test_another_preconditioner_is_refused():
    found, other = work("mlp"), work("mlp")

    def made(sketch):
        compressor = dropinf.Compressor(found.model, sketch, found.loss_fn)
        return dropinf.build_fisher(compressor.compress(found.batches)), compressor

    with pytest.raises(ValueError, match="its Compressor is of another model"):
        refine(other, precondition=made(dropinf.Dropout(3)))
    with pytest.raises(ValueError, match="mixes or weighs entries"):
        refine(found, precondition=made(dropinf.Gaussian(3)))
    with pytest.raises(ValueError, match=r"tracks 0\.weight, which is not refined"):
        refine(found, precondition=made(dropinf.Dropout(3)), layers="4")
    fisher, compressor = made(dropinf.Dropout(3))[0], made(dropinf.Dropout(3, seed=1))[1]
    with pytest.raises(ValueError, match="sketch"):
        refine(found, precondition=(fisher, compressor))


def test_a_curvature_that_is_not_positive_is_refused():
    found = work("mlp")
    concave = lambda outputs, batch: -outputs.square().sum(1)  # noqa: E731
    loss = lambda model, batch: concave(model(batch[0]), batch)  # noqa: E731
    options = {"curvature": "gauss-newton", "outputs_fn": plain, "loss_of_outputs": concave}
    with pytest.raises(ValueError, match="the mean diagonal of the curvature is -"):
        dropinf.refine(found.model, found.queries, found.batches, loss, **options)
    with pytest.raises(ValueError, match="the damped curvature is not positive along the direction of query 0"):
        dropinf.refine(found.model, found.queries, found.batches, loss, damping=1e-6, absolute=True, **options)


def test_a_gradient_that_is_changed_on_its_way_is_refused():
    found = work("mlp")

    class Halved(nn.Module):
        def forward(self, x):
            if x.requires_grad:
                x.register_hook(lambda g: g / 2)
            return x

    found.model[3] = Halved()
    with pytest.raises(RuntimeError, match="forward-mode derivative along a direction and its backward differ"):
        refine(found)


def test_a_weight_that_forward_mode_does_not_reach_is_refused():
    found = work("mlp")

    class Kept(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.held = inner, [inner.weight, inner.bias]

        def forward(self, x):
            return nn.functional.linear(x, *self.held)

    for i in (0, 2, 4):
        found.model[i] = Kept(found.model[i])
    with pytest.raises(RuntimeError, match="forward-mode derivative along a direction and its backward differ"):
        refine(found)


def test_an_op_with_neither_derivative_is_named():
    model = nn.Sequential(nn.EmbeddingBag(9, 4, mode="mean"), nn.Tanh(), nn.Linear(4, 1))
    batches = [torch.randint(0, 9, (5, 3))]
    with pytest.raises(RuntimeError, match="an op has neither a forward-mode nor a second derivative"):
        dropinf.refine(model, batches, batches, lambda model, ids: model(ids)[:, 0])


def test_an_op_that_is_differentiated_once_only_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(True)
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * (2 + 0 * len(ctx.saved_tensors))

    found = work("mlp")
    found.model[3] = nn.Identity()
    found.model[3].forward = Once.apply
    with pytest.raises(RuntimeError, match="an op can be differentiated once only"):
        refine(found)


def test_batch_norm_in_train_mode_is_refused():
    found = work("mlp")
    found.model[3] = nn.BatchNorm1d(5).double()
    with pytest.raises(ValueError, match="BatchNorm '3' is in train mode"):
        refine(found)


class Counting(nn.Module):
    """Counts its calls, keeps what it saw, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.drop = [], nn.Dropout(0.3)

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        self.last = x.detach()
        return self.drop(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_afterwards_what_it_was(fails):
    found = work("mlp")
    found.model[3] = Counting()
    found.model.train()
    found.model[1].eval()
    found.model[0].weight.requires_grad_(False)
    found.model[4].weight.grad = torch.ones_like(found.model[4].weight)
    before, grads = copy.deepcopy(found.model), [p.grad for p in found.model.parameters()]
    state = torch.get_rng_state()
    loss = (lambda model, batch: 1 / 0) if fails else None
    try:
        refined = refine(found, query_loss=loss, steps=2, damping=1.0)
        assert "0.weight" not in refined.direction.parameters
    except ZeroDivisionError:
        assert fails
    assert torch.equal(torch.get_rng_state(), state)
    for (name, now), (_, was) in zip(found.model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(now, was), name
        assert now.requires_grad == was.requires_grad
    assert all(p.grad is g for p, g in zip(found.model.parameters(), grads, strict=True))
    assert bool((found.model[4].weight.grad == 1).all())
    assert [m.training for m in found.model.modules()] == [m.training for m in before.modules()]
    assert float(found.model[3].calls) == 0
    assert found.model[3].seen == []
    assert not hasattr(found.model[3], "last")


def test_progress_is_shown_on_standard_error(capsys):
    refine(work("mlp"), progress=True, steps=2)
    captured = capsys.readouterr()
    assert not captured.out
    assert "step 2, residuals" in captured.err
    refine(work("mlp"))
    assert not capsys.readouterr().err
