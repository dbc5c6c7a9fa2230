"""Autograd Functions that run modules or make gradients in their own way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.right_or_refused import Cases, Raw, check, doubles, mlp, points, runs, squares  # noqa: F401

CASES = Cases()


class Adjoint(torch.autograd.Function):
    """Runs a function without a graph, and again with one in backward."""

    @staticmethod
    def forward(ctx, f, x, *ps):
        ctx.f, ctx.ps = f, ps
        ctx.save_for_backward(x)
        with torch.no_grad():
            return f(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return None, *torch.autograd.grad(ctx.f(x), (x, *ctx.ps), g)


class Ode(nn.Module):
    """A few steps of Euler's method by the adjoint."""

    def __init__(self, f, first=True):
        super().__init__()
        self.i, self.f, self.h = nn.Linear(3, 4), f, nn.Linear(4, 1)

    def forward(self, x):
        z = self.i(x)
        for _ in range(2):
            z = z + 0.5 * torch.tanh(Adjoint.apply(self.f, z, *self.f.parameters()))
        return self.h(z)


@CASES.add()
def adjoint_of_a_linear():
    return Ode(nn.Linear(4, 4)), squares, points()


@CASES.add()
def adjoint_of_raw_parameters():
    return Ode(Raw()), squares, points()


@CASES.add()
def adjoint_of_layers():
    return Ode(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))), squares, points()


@CASES.add()
def adjoint_at_the_input():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.h = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.h(torch.tanh(Adjoint.apply(self.f, x, *self.f.parameters())))

    return First(), squares, points()


@CASES.add()
def adjoint_of_flat_parameters():
    class Flat(torch.autograd.Function):
        @staticmethod
        def forward(ctx, f, x, flat):
            ctx.f = f
            ctx.save_for_backward(x, flat)
            with torch.no_grad():
                return f(x)

        @staticmethod
        def backward(ctx, g):
            x, _ = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                gx, *gs = torch.autograd.grad(ctx.f(x), (x, *ctx.f.parameters()), g)
            return None, gx, torch.cat([p.flatten() for p in gs])

    class FlatOde(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.f, self.h = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            flat = torch.cat([p.flatten() for p in self.f.parameters()])
            return self.h(torch.tanh(Flat.apply(self.f, self.i(x), flat)))

    return FlatOde(), squares, points()


class Reversible(torch.autograd.Function):
    """Two coupled halves; backward rebuilds the inputs and writes into the parameters' .grad by itself."""

    @staticmethod
    def forward(ctx, x, f, g):
        ctx.f, ctx.g = f, g
        a, b = x.chunk(2, -1)
        with torch.no_grad():
            c = a + f(b)
            d = b + g(c)
        y = torch.cat([c, d], -1)
        ctx.save_for_backward(y.detach())
        return y

    @staticmethod
    def backward(ctx, gy):
        (y,) = ctx.saved_tensors
        c, d = y.chunk(2, -1)
        gc, gd = gy.chunk(2, -1)
        with torch.enable_grad():
            c = c.detach().requires_grad_(True)
            gout = ctx.g(c)
            torch.autograd.backward(gout, gd)
        with torch.no_grad():
            b = d - gout
            ga = gc + c.grad
        with torch.enable_grad():
            b = b.detach().requires_grad_(True)
            torch.autograd.backward(ctx.f(b), ga)
        return torch.cat([ga, gd + b.grad], -1), None, None


def reversible(make):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.f, self.g, self.h = nn.Linear(3, 8), make(), make(), nn.Linear(8, 1)

        def forward(self, x):
            return self.h(Reversible.apply(self.i(x), self.f, self.g))

    return Net(), squares, points()


@CASES.add()
def reversible_of_linears():
    return reversible(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()))


@CASES.add()
def reversible_of_raw_parameters():
    return reversible(Raw)


@CASES.add()
def straight_through_weights():
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):  # noqa: ARG004
            return w.sign()

        @staticmethod
        def backward(ctx, g):  # noqa: ARG004
            return g

    class Binary(nn.Linear):
        def forward(self, x):
            return F.linear(x, Sign.apply(self.weight), self.bias)

    return nn.Sequential(Binary(3, 4), nn.Tanh(), Binary(4, 2)), squares, points()


@CASES.add()
def straight_through_activations():
    class Binary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h + (h.sign() - h).detach())

    return Binary(), squares, points()


class FusedLoss(torch.autograd.Function):
    """Output layer and loss at once; the gradients are made in forward, as fused kernels do."""

    @staticmethod
    def forward(ctx, h, w, y):
        with torch.enable_grad():
            h_, w_ = h.detach().requires_grad_(True), w.detach().requires_grad_(True)
            losses = F.cross_entropy(h_ @ w_.T, y, reduction="none")
            rows = [torch.autograd.grad(one, (h_, w_), retain_graph=True) for one in losses]
        ctx.rows = rows
        return losses.detach()

    @staticmethod
    def backward(ctx, g):
        return (
            sum(gi * h for gi, (h, _) in zip(g, ctx.rows, strict=True)),
            sum(gi * w for gi, (_, w) in zip(g, ctx.rows, strict=True)),
            None,
        )


@CASES.add()
def fused_linear_and_loss():
    return mlp(last=3), lambda m, b: FusedLoss.apply(m[:2](b[0]), m[2].weight, b[1]), [
        (x, torch.randint(0, 3, (len(x),))) for x in points()
    ]  # fmt: skip


@CASES.add()
def linear_function_of_its_own():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.T

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g @ w, g.T @ x

    class Layer(nn.Linear):
        def forward(self, x):
            return Own.apply(x, self.weight) + self.bias

    return nn.Sequential(Layer(3, 4), nn.Tanh(), Layer(4, 1)), squares, points()


@CASES.add(right=False)
def function_with_a_gradient_of_its_own():
    """The weight's gradient is half of what the forward says, by the Function's own will."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.T

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g @ w, 0.5 * (g.T @ x).clamp(-0.2, 0.2)

    class Layer(nn.Linear):
        def forward(self, x):
            return Half.apply(x, self.weight) + self.bias

    return nn.Sequential(Layer(3, 4), nn.Tanh(), Layer(4, 1)), squares, points()


@CASES.add()
def activation_hooks():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            if h.requires_grad:
                h.register_hook(lambda g: 3 * g)
            return self.b(h)

    return Hooked(), squares, points()


@CASES.add(right=False)
def activation_hooks_that_clip_the_batch():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            if h.requires_grad:
                h.register_hook(lambda g: g / g.norm().clamp_min(1e-3))
            return self.b(h)

    return Hooked(), squares, points()


@CASES.add()
def in_place_ops_and_saved_activations():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.b = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x).relu_()
            h = self.n(h)
            h += 1
            h[:, 0] *= 2
            out = torch.zeros(len(x), 2)
            out[:, :1] = self.b(h)[:, 1:]
            out[:, 1] += h.sum(1)
            return out

    return InPlace(), squares, points()


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
