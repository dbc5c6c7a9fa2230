"""Derivatives that are taken inside a loss or a forward: penalties, forces, adversarial and unrolled steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tests.capture.right_or_refused import Cases, check, doubles, mlp, points, runs, squares  # noqa: F401

CASES = Cases()
grad = torch.autograd.grad


@CASES.add()
def penalty():
    def loss(m, x):
        x = x.clone().requires_grad_(True)
        return grad(m(x).sum(), x, create_graph=True)[0].square().sum(1)

    return mlp(), loss, points()


@CASES.add()
def penalty_beside_the_loss():
    def loss(m, x):
        x = x.clone().requires_grad_(True)
        y = m(x)
        return y.square().sum(1) + 10 * (grad(y.sum(), x, create_graph=True)[0].norm(dim=1) - 1).square()

    return mlp(), loss, points()


@CASES.add()
def penalty_with_raw_parameters():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return torch.tanh(x @ self.a) @ self.b

    def loss(m, x):
        x = x.clone().requires_grad_(True)
        return grad(m(x).sum(), x, create_graph=True)[0].square().sum(1)

    return Raw(), loss, points()


@CASES.add()
def penalty_of_every_other_batch():
    def loss(m, batch):
        x, lazy = batch
        x = x.clone().requires_grad_(True)
        y = m(x)
        out = y.square().sum(1)
        return out if lazy else out + grad(y.sum(), x, create_graph=True)[0].square().sum(1)

    return mlp(), loss, [(x, k % 2 == 0) for k, x in enumerate(points())]


@CASES.add()
def pinn():
    def loss(m, x):
        x = x.clone().requires_grad_(True)
        u = m(x)
        d = grad(u.sum(), x, create_graph=True)[0]
        laplace = sum(grad(d[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(3))
        return (laplace + u[:, 0] ** 3).square()

    return mlp(), loss, points()


class Energy(nn.Module):
    """Energies and forces of atoms; the forces are a derivative inside the forward."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)

    def forward(self, r):
        with torch.enable_grad():
            r = r.detach().requires_grad_(True)
            e = self.b(torch.tanh(self.norm(self.a(r)))).sum((1, 2))
            return e, -grad(e.sum(), r, create_graph=True)[0]


@CASES.add()
def forces():
    def loss(m, r):
        e, f = m(r)
        return e.square() + 5 * f.square().sum((1, 2))

    return Energy(), loss, [torch.randn(n, 5, 3) for n in (4, 4, 5, 2, 1)]


@CASES.add()
def forces_alone():
    return Energy(), lambda m, r: m(r)[1].square().sum((1, 2)), [torch.randn(n, 2, 3) for n in (2, 4, 3, 1)]


@CASES.add()
def forces_as_a_detached_feature():
    class Feature(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.h = mlp(), nn.Linear(3, 2)

        def forward(self, x):
            with torch.enable_grad():
                r = x.detach().requires_grad_(True)
                f = grad(self.e(r).sum(), r)[0]
            return torch.cat([self.h(f), self.e(x)], 1)

    return Feature(), squares, points()


@CASES.add()
def adversarial_step():
    def loss(m, b):
        x = b.clone().requires_grad_(True)
        g = grad(m(x).square().sum(), x)[0]
        return m(b + 0.1 * g.sign()).square().sum(1)

    return mlp(), loss, points()


@CASES.add()
def adversarial_step_beside_the_clean_loss():
    def loss(m, b):
        x = b.clone().requires_grad_(True)
        clean = m(x).square().sum(1)
        g = grad(clean.sum(), x, retain_graph=True)[0]
        return clean + m(b + 0.1 * g).square().sum(1)

    return mlp(), loss, points()


@CASES.add()
def adversarial_steps_by_backward():
    def loss(m, b):
        x = b.clone()
        for _ in range(3):
            x = x.detach().requires_grad_(True)
            m(x).square().sum().backward(inputs=[x])
            x = x + 0.1 * x.grad
        return m(x.detach()).square().sum(1)

    return mlp(), loss, points()


@CASES.add()
def virtual_adversarial():
    def loss(m, b):
        clean = F.log_softmax(m(b), 1)
        d = F.normalize(b.flip(1), dim=1).requires_grad_(True)
        gap = F.kl_div(F.log_softmax(m(b + 0.1 * d), 1), clean.detach(), log_target=True, reduction="none").sum()
        d = F.normalize(grad(gap, d)[0], dim=1)
        noisy = F.log_softmax(m(b + d), 1)
        return F.kl_div(noisy, clean, log_target=True, reduction="none").sum(1) - clean[:, 0]

    return mlp(last=3), loss, points()


@CASES.add()
def inner_backward_with_create_graph():
    def loss(m, b):
        x = b.clone().requires_grad_(True)
        m(x).sum().backward(inputs=[x], create_graph=True)
        return x.grad.square().sum(1)

    return mlp(), loss, points()


@CASES.add(right=False)
def inner_backward_into_the_parameters():
    def loss(m, b):
        x = b.clone().requires_grad_(True)
        m(x).square().sum().backward()
        m.zero_grad()
        return m(b + 0.1 * x.grad).square().sum(1)

    return mlp(), loss, points()


@CASES.add(right=False)
def inner_backward_into_the_parameters_that_stays():
    def loss(m, b):
        m(b).sum().backward()
        return m(b).square().sum(1)

    return mlp(), loss, points()


@CASES.add()
def unrolled_latent_steps():
    def loss(m, b):
        z = torch.zeros_like(b).requires_grad_(True)
        for _ in range(2):
            z = z - 0.3 * grad((m(z + b).square()).sum(), z, create_graph=True)[0]
        return m(z).sum(1) + z.square().sum(1)

    return mlp(), loss, points()


def step_of(m, x, lr=0.3):
    """The weights after one step on one sample."""
    w = dict(m.named_parameters())
    g = grad(functional_call(m, w, (x[None],)).square().sum(), list(w.values()), create_graph=True)
    return {k: p - lr * d for (k, p), d in zip(w.items(), g, strict=True)}


@CASES.add()
def unrolled_step_on_each_sample():
    def loss(m, b):
        return torch.stack([functional_call(m, step_of(m, x), (2 * x[None],)).square().sum() for x in b])

    return mlp(), loss, points()


@CASES.add()
def unrolled_step_first_order():
    def loss(m, b):
        out = []
        for x in b:
            fast = {
                k: p.detach() - m_p.detach() + m_p
                for (k, p), m_p in zip(step_of(m, x).items(), m.parameters(), strict=True)
            }
            out.append(functional_call(m, fast, (2 * x[None],)).square().sum())
        return torch.stack(out)

    return mlp(), loss, points()


@CASES.add()
def size_of_each_sample_s_gradient():
    def loss(m, b):
        ps = list(m.parameters())
        return torch.stack([sum(g.square().sum() for g in grad(m(x[None]).sum(), ps, create_graph=True)) for x in b])

    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), loss, points()


@CASES.add(right=False)
def vmap_of_grad_inside():
    def loss(m, b):
        w = dict(m.named_parameters())
        return torch.func.vmap(torch.func.grad(lambda x: functional_call(m, w, (x,)).sum()))(b).square().sum(1)

    return mlp(), loss, points()


@CASES.add(right=False)
def jvp_inside():
    def loss(m, b):
        return torch.func.jvp(m, (b,), (torch.ones_like(b),))[1].square().sum(1)

    return mlp(), loss, points()


@CASES.add(right=False)
def jacobian_inside():
    def loss(m, b):
        return torch.stack([
            torch.autograd.functional.jacobian(lambda v: m(v[None])[0], x, create_graph=True).square().sum() for x in b
        ])  # fmt: skip

    return mlp(), loss, points()


@CASES.add()
def equilibrium_by_a_hook():
    class Equilibrium(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.i, self.h = nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(4, 1)
            self.f.weight.data.mul_(0.3)

        def forward(self, x):
            with torch.no_grad():
                z = torch.zeros(len(x), 4)
                for _ in range(60):
                    z = torch.tanh(self.f(z) + self.i(x))
            z = torch.tanh(self.f(z) + self.i(x))
            if z.requires_grad:
                z0 = z.detach().requires_grad_(True)
                f0 = torch.tanh(self.f(z0) + self.i(x).detach())

                def solve(g):
                    v = g
                    for _ in range(60):
                        v = grad(f0, z0, v, retain_graph=True)[0] + g
                    return v

                z.register_hook(solve)
            return self.h(z)

    return Equilibrium(), squares, points()


@CASES.add()
def gradient_reversal():
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # noqa: ARG004
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):  # noqa: ARG004
            return -0.5 * g

    class Domains(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return torch.cat([self.b(h), self.c(Reverse.apply(h))], 1)

    return Domains(), squares, points()


@CASES.add(right=False)
def gradient_clipped_on_its_way():
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # noqa: ARG004
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):  # noqa: ARG004
            return g / g.norm().clamp_min(0.01)

    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.b(Clip.apply(torch.tanh(self.a(x))))

    return Clipped(), squares, points()


@CASES.add()
def score_matching():
    def loss(m, x):
        x = x.clone().requires_grad_(True)
        s = m(x)
        v = torch.ones_like(x)
        return (grad((s * v).sum(), x, create_graph=True)[0] * v).sum(1) + 0.5 * s.square().sum(1)

    return mlp(last=3), loss, points()


@CASES.add()
def frozen_input_derivative():
    """The penalty's own input is frozen: its derivative is by the hidden layer."""

    def loss(m, x):
        h = m[0](x)
        y = m[2](torch.tanh(h))
        return grad(y.sum(), h, create_graph=True)[0].square().sum(1) + y.square().sum(1)

    return mlp(), loss, points()


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
