"""`torch.func`'s per-sample gradients, compressed by the masks that `Compressor` draws, one per axis."""

import sys

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

import dropinf
import dropinf_kernels as ops


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)).eval()
x, y = torch.randn(8, 64), torch.randint(10, (8,))
one = grad(lambda p, x, y: F.cross_entropy(functional_call(model, p, (x[None],)), y[None]))
gradients = vmap(one, in_dims=(None, 0, 0))({n: p.detach() for n, p in model.named_parameters()}, x, y)

compressor = dropinf.Compressor(model, dropinf.Dropout(dim=8), loss_fn, layers=["0", "2"])
want, same = compressor.compress([(x, y)]), True
for name, plan in compressor.layers.items():
    rows = ops.sketch(gradients[plan.parameter], plan.in_axis.index) if plan.in_axis else gradients[plan.parameter]
    c = ops.sketch(rows.mT, plan.out_axis.index).mT if plan.in_axis else ops.sketch(rows, plan.out_axis.index)
    same &= torch.allclose(c, want[name], rtol=1e-5, atol=1e-6 * float(want[name].abs().max()))
    print(f"{name}: torch.func {tuple(c.shape)} against Compressor: {float((c - want[name]).abs().max()):.1e}")
sys.exit(not same)
