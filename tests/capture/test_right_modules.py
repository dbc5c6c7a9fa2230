"""Users' hooks, forwards of an instance, classes with borrowed names, and flags that a forward reads."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.right_or_refused import Cases, check, doubles, mlp, points, runs, squares  # noqa: F401

CASES = Cases()
TOKENS = [torch.randint(0, 7, (n, 5)) for n in (4, 4, 5, 3, 1)]


@CASES.add()
def hook_changes_an_output():
    m = mlp()
    m[0].register_forward_hook(lambda mod, i, o: 3 * o)
    return m, squares, points()


@CASES.add()
def hook_uses_the_weight():
    m = mlp()
    m[0].register_forward_hook(lambda mod, i, o: o + i[0] @ mod.weight.square().t())
    return m, squares, points()


@CASES.add()
def hook_changes_an_input():
    m = mlp()
    m[2].register_forward_pre_hook(lambda mod, i: (i[0] + 1,))
    return m, squares, points()


@CASES.add()
def hook_with_kwargs_always_called():
    m = mlp()
    m[2].register_forward_pre_hook(lambda mod, a, k: ((a[0] * 2,), k), with_kwargs=True)
    m[2].register_forward_hook(lambda mod, a, k, o: o.square(), with_kwargs=True, always_call=True)
    return m, squares, points()


@CASES.add()
def hook_of_a_parent():
    m = nn.Sequential(mlp(last=3), nn.LayerNorm(3))
    m[0].register_forward_hook(lambda mod, i, o: o * i[0])
    m.register_forward_pre_hook(lambda mod, i: (i[0].flip(1),))
    return m, squares, points()


@CASES.add()
def hook_reorders_the_rows():
    m = mlp()
    m[0].register_forward_pre_hook(lambda mod, i: (i[0].flip(0),))
    m[0].register_forward_hook(lambda mod, i, o: o.flip(0))
    return m, squares, points()


@CASES.add()
def hook_collects_features():
    m = mlp()
    features = []
    m[0].register_forward_hook(lambda mod, i, o: features.append(o))

    def loss(m, x):
        features.clear()
        y = m(x)
        return y.square().sum(1) + features[0].square().sum(1)

    return m, loss, points()


@CASES.add()
def backward_hook_scales():
    m = mlp()
    m[2].register_full_backward_hook(lambda mod, gi, go: (gi[0] * 2,))
    return m, squares, points()


@CASES.add()
def backward_pre_hook_scales():
    m = mlp()
    m[0].register_full_backward_pre_hook(lambda mod, go: (go[0] * 2,))
    return m, squares, points()


@CASES.add(right=False)
def backward_hook_clips():
    m = mlp()
    m[2].register_full_backward_hook(lambda mod, gi, go: (gi[0] / gi[0].norm().clamp_min(1e-3),))
    return m, squares, points()


@CASES.add()
def backward_hook_only_looks():
    m = mlp()
    m[2].register_full_backward_hook(lambda mod, gi, go: None)
    m[0].register_full_backward_hook(lambda mod, gi, go: None)
    return m, squares, points()


@CASES.add()
def forward_of_the_instance():
    m = mlp()
    m[0].forward = lambda x, l=m[0]: 3 * F.linear(x, l.weight, l.bias)  # noqa: E741
    return m, squares, points()


@CASES.add()
def forward_of_the_instance_wraps():
    m = mlp()
    old = m[0].forward
    m[0].forward = lambda x: old(x + 1).square()
    return m, squares, points()


@CASES.add()
def forward_of_the_instance_is_a_partial():
    m = mlp()
    m[2].forward = functools.partial(lambda l, x, k: F.linear(x * k, l.weight.abs(), l.bias), m[2], k=2)  # noqa: E741
    return m, squares, points()


@CASES.add()
def forward_of_the_class_is_patched():
    class Patched(nn.Linear):
        pass

    Patched.forward = lambda self, x: F.linear(x, self.weight * 2) - self.bias
    return nn.Sequential(Patched(3, 4), nn.Tanh(), Patched(4, 1)), squares, points()


class Conv1D(nn.Module):
    """A convolution over time, with the name of another library's linear layer."""

    def __init__(self, i, o):
        super().__init__()
        self.weight, self.bias, self.nf = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o)), o

    def forward(self, x):
        return torch.cumsum(x @ self.weight, 1) + self.bias


@CASES.add()
def own_conv1d():
    return nn.Sequential(Conv1D(3, 4), nn.Tanh(), Conv1D(4, 2)), squares, [torch.randn(n, 4, 3) for n in (4, 4, 3, 1)]


@CASES.add()
def own_conv1d_that_is_square():
    m = Conv1D(3, 3)
    m.forward = lambda x: x @ m.weight.T * m.bias
    return nn.Sequential(m, nn.Linear(3, 1)), squares, points()


def rms_norm(scale):
    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6, 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * scale(self.weight)

    return nn.Sequential(nn.Linear(3, 4), LlamaRMSNorm(), nn.Linear(4, 2)), squares, points()


@CASES.add()
def own_rms_norm_squared():
    return rms_norm(torch.square)


@CASES.add()
def own_rms_norm_shifted():
    return rms_norm(lambda w: 1 + w)


@CASES.add()
def own_rms_norm_rolled():
    return rms_norm(lambda w: w.roll(1))


def subclassed(base, *arguments, forward, inputs=None, **more):
    name = base.__name__
    cls = type(name, (base,), {"forward": forward})
    torch.manual_seed(2)
    m = cls(*arguments, **more)
    for p in m.parameters():
        p.data.normal_()
    return m, squares, inputs or points()


@CASES.add()
def linear_that_masks_its_weight():
    return subclassed(nn.Linear, 3, 2, forward=lambda s, x: F.linear(x, s.weight.tril(), s.bias))


@CASES.add()
def linear_that_adds_its_input():
    return subclassed(nn.Linear, 3, 3, forward=lambda s, x: nn.Linear.forward(s, x) * x + s.bias)


@CASES.add()
def embedding_that_scales_with_its_norm():
    return subclassed(
        nn.Embedding, 7, 3, forward=lambda s, i: F.embedding(i, s.weight) * s.weight.norm(), inputs=TOKENS
    )


@CASES.add()
def embedding_with_an_offset():
    return subclassed(nn.Embedding, 9, 3, forward=lambda s, i: nn.Embedding.forward(s, i + 2), inputs=TOKENS)


@CASES.add()
def standardized_convolution():
    def forward(s, x):
        w = s.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, s.bias)

    return subclassed(nn.Conv2d, 2, 3, 2, forward=forward, inputs=[torch.randn(n, 2, 4, 4) for n in (4, 4, 3, 1)])


@CASES.add()
def layer_norm_of_channels():
    forward = lambda s, x: F.layer_norm(x.movedim(1, -1), (3,), s.weight, s.bias).movedim(-1, 1)  # noqa: E731
    return subclassed(nn.LayerNorm, 3, forward=forward, inputs=[torch.randn(n, 3, 4) for n in (4, 4, 3, 1)])


@CASES.add()
def batch_norm_in_eval_mode_with_an_activation():
    m, loss, x = subclassed(nn.BatchNorm1d, 3, forward=lambda s, x: F.softplus(nn.BatchNorm1d.forward(s, x)))
    return m.eval(), loss, x


class Gated(nn.Module):
    """Takes another path where a condition on the module, or on its input, holds."""

    def __init__(self, condition):
        super().__init__()
        self.l, self.s, self.h, self.condition = (
            nn.Linear(3, 3),
            nn.Parameter(torch.randn(3)),
            nn.Linear(3, 2),
            condition,
        )
        self.id, self.pointer = id(self.l.weight), self.l.weight.data_ptr()

    def forward(self, x):
        h = self.l(x)
        return self.h(torch.tanh(h * self.s if self.condition(self, h) else h))


GATES = {
    "requires_grad_of_the_weight": lambda m, h: m.l.weight.requires_grad,
    "requires_grad_of_all": lambda m, h: all(p.requires_grad for p in m.parameters()),
    "requires_grad_of_the_raw": lambda m, h: m.s.requires_grad,
    "requires_grad_of_the_activation": lambda m, h: h.requires_grad,
    "grad_mode": lambda m, h: torch.is_grad_enabled(),
    "leaf": lambda m, h: m.l.weight.is_leaf and m.s.is_leaf,
    "parameter": lambda m, h: type(m.l.weight) is nn.Parameter and isinstance(m.s, nn.Parameter),
    "identity": lambda m, h: id(m.l.weight) == m.id,
    "pointer": lambda m, h: m.l.weight.data_ptr() == m.pointer,
    "no_grad_yet": lambda m, h: m.l.weight.grad is None,
    "no_hooks": lambda m, h: not m.l._forward_hooks and not m.l._forward_pre_hooks and "forward" not in m.l.__dict__,
    "class": lambda m, h: type(m.l) is nn.Linear and type(m) is Gated,
    "training": lambda m, h: m.training,
    "plain_tensor": lambda m, h: type(h) is torch.Tensor,
    "two_dimensions": lambda m, h: h.ndim == 2,
    "the_batch_is_large": lambda m, h: len(h) > 3,
}
for name, condition in GATES.items():

    def gated(condition=condition):
        return Gated(condition), squares, points()

    gated.__name__ = f"gate_{name}"
    CASES.add(right=name not in ("requires_grad_of_all", "no_grad_yet", "the_batch_is_large", "no_hooks"))(gated)


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
