"""The harness: a model's compressed rows against one plain backward of each loss of its batches, in float64.

A case is a function that builds a model, a loss and batches from a fixed seed. It is called once for dropinf and once
more, on a twin that dropinf never sees, for every row of the oracle; so no state of one run reaches another. The oracle's
rows are kept for the next test of the case. What a case asserts is *right or refused*: every row of every layer is right,
or a ValueError or RuntimeError names what is in the way.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropinf
from tests.api.oracle import sketched

TOLERANCE = 1e-8
HOOKS = [
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_load_state_dict_pre_hooks",
]  # fmt: skip
RUNS = [
    pytest.param(lambda: dropinf.Identity(), False, id="whole", marks=pytest.mark.long),
    pytest.param(lambda: dropinf.Identity(), True, id="whole-backwards", marks=pytest.mark.more),
    pytest.param(lambda: dropinf.Dropout(2), False, id="mask"),
    pytest.param(lambda: dropinf.Dropout(2), True, id="mask-backwards", marks=pytest.mark.long),
]
runs = pytest.mark.parametrize(("sketch", "backwards"), RUNS)
Build = Callable[[], tuple[nn.Module, Callable[[nn.Module, Any], Tensor], list[Any]]]


class Cases(list):
    """Cases of one file, each a pytest parameter with the name of its function."""

    def add(self, **options):
        """Register the decorated function, with options of `check`."""

        def register(build):
            self.append(pytest.param(build, options, id=build.__name__))
            return build

        return register

    def parametrize(self):
        """Return the decorator of the test that runs them."""
        return pytest.mark.parametrize(("build", "options"), self)


@pytest.fixture(autouse=True)
def doubles():
    """Everything that a test builds is in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def built(build: Build):
    """Return model, loss and batches of a case, always the same."""
    torch.manual_seed(11)
    model, loss_fn, batches = build()
    torch.manual_seed(12)
    return model, loss_fn, batches


def nothing(model: nn.Module) -> None:
    """Leave a model as it is."""


@functools.cache
def gradients(build: Build, b: int, prepare, after) -> dict[str, Tensor]:
    """Parameter -> gradients [N, *shape] of batch ``b``: one backward of one loss of a fresh twin each."""
    rows: dict[str, list[Tensor]] = {}
    i, n = 0, 1
    while i < n:
        model, loss_fn, batches = built(build)
        prepare(model)
        after(model)
        for p in model.parameters():
            p.grad = None
        losses = loss_fn(model, batches[b])
        assert losses.ndim == 1
        n = len(losses)
        losses[i].backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                g = torch.zeros_like(p) if p.grad is None else p.grad.to_dense().detach().clone()
                rows.setdefault(name, []).append(g)
        i += 1
    return {name: torch.stack(r) for name, r in rows.items()}


def plain(build: Build, seen: list[int], prepare=nothing, after=nothing) -> dict[str, Tensor]:
    """Parameter -> gradients [N, *shape] of the batches ``seen``, one after the other."""
    parts = [gradients(build, b, prepare, after) for b in seen]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def worst(compressor, got, want: dict[str, Tensor]) -> dict[str, float]:
    """Layer -> relative error, of the layers that are wrong. Each row counts for itself."""
    wrong = {}
    largest = max(float(g.abs().max()) for g in want.values())
    for name, layer in compressor.layers.items():
        expected = sketched(layer, want[layer.parameter])
        assert got[name].shape == expected.shape, f"{name}: {tuple(got[name].shape)} for {tuple(expected.shape)}"
        difference = (got[name].double() - expected).flatten(1).norm(dim=1)
        scale = expected.flatten(1).norm(dim=1).clamp_min(1e-6 * largest).clamp_min(1e-300)
        error = float((difference / scale).max())
        if not error <= TOLERANCE:
            wrong[name] = error
    return wrong


def contents(value: Any) -> Any:
    """What must be the same objects in an attribute."""
    if isinstance(value, dict):
        return [(k, v) for k, v in value.items()]
    return list(value) if isinstance(value, (list, tuple)) else value


def snapshot(model: nn.Module, but: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Everything of a model that dropinf must leave alone; attributes named in ``but`` are a model's own caches."""
    kept: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kept[f"{name} class"] = type(module)
        kept[f"{name} training"] = module.training
        kept[f"{name} attributes"] = sorted(set(module.__dict__) - but)
        for hooks in HOOKS:
            kept[f"{name} {hooks}"] = list(getattr(module, hooks).items())
        for key, value in module.__dict__.items():
            if key not in HOOKS and key not in but and key != "training":
                kept[f"{name} attribute {key}"] = contents(value)
    for name, p in model.named_parameters(remove_duplicate=False):
        kept[f"{name} object"] = p
        kept[f"{name} value"] = p.detach().clone()
        kept[f"{name} requires_grad"] = p.requires_grad
        kept[f"{name} class"] = type(p)
        kept[f"{name} .grad"] = p.grad
        kept[f"{name} .grad's value"] = None if p.grad is None else p.grad.detach().clone()
        kept[f"{name} hooks"] = list((p._backward_hooks or {}).items())
        kept[f"{name} post hooks"] = list((getattr(p, "_post_accumulate_grad_hooks", None) or {}).items())
        kept[f"{name} dict"] = sorted(p.__dict__)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name.rpartition(".")[2] not in but:
            kept[f"{name} object"] = buffer
            kept[f"{name} value"] = buffer.detach().clone()
    kept["grad mode"] = torch.is_grad_enabled()
    return kept


def same(a: Any, b: Any) -> bool:
    """Whether two entries of a snapshot are equal: objects by identity, copies of values by value."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a is b or bool(a == b)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what is different between two snapshots."""
    found = sorted(set(before) ^ set(after))
    for key in set(before) & set(after):
        a, b = before[key], after[key]
        if key.endswith("value") and isinstance(a, Tensor) and isinstance(b, Tensor):
            if not torch.equal(a, b):
                found.append(key)
        elif not same(a, b):
            found.append(key)
    return found


def named_by(error: Exception, names: list[str], says: str | None) -> bool:
    """Whether a refusal says something that helps: a parameter, a module, a class or an argument by its name."""
    message = str(error)
    if says is not None:
        return re.search(says, message) is not None
    words = [*names, "loss_fn", "mixing", "cu_seqlens", "layers=", "route="]
    return any(re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", message) for word in words)


def names_of(model: nn.Module) -> list[str]:
    """The names of parameters, modules and classes of a model."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_modules(remove_duplicate=False) if len(name) > 1]
    return names + [type(module).__name__ for module in model.modules()]


def check(
    build: Build,
    sketch,
    backwards: bool = False,
    *,
    right: bool = True,
    mixing: bool = False,
    says: str | None = None,
    but: frozenset[str] = frozenset(),
    after=nothing,
    prepare=nothing,
    skips: frozenset[str] = frozenset(),
    twin: bool = True,
    unhook: Build | None = None,
    **arguments: Any,
) -> None:
    """Compare all rows of a case, in the order of its batches and then in the other one, with the oracle.

    ``right``: nothing but right rows will do; else a refusal by name will do too. ``after`` is done to the model once
    the Compressor is made, and to each of the oracle's twins; ``prepare`` before. ``skips``: parameters that may be left
    out. ``unhook`` builds the oracle's twin without what only watches. Other arguments go to the Compressor.
    """
    model, loss_fn, batches = built(build)
    prepare(model)
    order = list(range(len(batches)))[:: -1 if backwards else 1]
    before = snapshot(model, but)
    random = torch.get_rng_state()
    names = names_of(model)
    refusal = None
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compressor = dropinf.Compressor(model, sketch(), loss_fn, mixing=mixing, **arguments)
            if changed := changes(before, snapshot(model, but)):
                raise AssertionError(f"changed by the constructor: {changed}")
            after(model)
            before = snapshot(model, but)
            random = torch.get_rng_state()
            for seen in (order, order[::-1]):
                results.append((seen, compressor.compress([batches[b] for b in seen])))  # noqa: PERF401
        except (ValueError, RuntimeError) as error:
            refusal = error
    changed = changes(before, snapshot(model, but))
    assert not changed, f"the model is not what it was: {changed}"
    assert torch.equal(random, torch.get_rng_state()), "the random state is not what it was"
    for seen, got in results:
        want = plain(unhook or build, seen, prepare, after if twin else nothing)
        covered = {layer.parameter for layer in compressor.layers.values()}
        assert covered | skips >= set(want), f"left out: {set(want) - covered}, {compressor.skipped}"
        wrong = worst(compressor, got, want)
        assert not wrong, f"WRONG without an error: {wrong}"
    if refusal is not None:
        print(f"refused: {type(refusal).__name__}: {refusal}")
        assert not right, f"refused what is right: {type(refusal).__name__}: {refusal}"
        assert named_by(refusal, names + names_of(model), says), (
            f"does not say what is in the way: {type(refusal).__name__}: {refusal}"
        )


def check_mixing(build: Build, sketch, backwards: bool = False, **options: Any) -> None:
    """A loss that meets other samples is an AttributionError, and with ``mixing=True`` the derivative in its batch."""
    model, loss_fn, batches = built(build)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressor = dropinf.Compressor(model, sketch(), loss_fn)
        with pytest.raises(dropinf.AttributionError) as refusal:
            compressor.compress(batches[::-1] if backwards else batches)
    print(f"refused: {refusal.value}")
    assert "mixing" in str(refusal.value), f"does not say mixing=: {refusal.value}"
    assert not changes(before, snapshot(model))
    check(build, sketch, backwards, mixing=True, **options)


def mlp(width: int = 4, last: int = 1) -> nn.Module:
    """A model of two linear layers."""
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, last))


def own(h: Tensor) -> Tensor:
    """The sum of squares of each sample's numbers."""
    return h.flatten(1).square().sum(1)


def later(xs: list[Tensor] | None = None) -> list[Any]:
    """Batches with a factor that is zero in the first."""
    return list(zip(points(4, 4, 4) if xs is None else xs, (0.0, 1.0, 1.0), strict=True))


class Multiply(torch.autograd.Function):
    """x w^T, which no mode sees."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


class ScaledGradient(torch.autograd.Function):
    """Its gradient is ``factor`` times what it would be."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


def points(*sizes: int, width: int = 3) -> list[Tensor]:
    """Batches of vectors, of these sizes."""
    return [torch.randn(n, width) for n in sizes or (4, 4, 5, 3, 1)]


def squares(model: nn.Module, x: Any) -> Tensor:
    """The sum of squares of a model's outputs, for each sample."""
    return (model(*x) if isinstance(x, tuple) else model(x)).flatten(1).square().sum(1)


class Raw(nn.Module):
    """Raw parameters alone."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        return torch.tanh(x @ self.w + self.b)
