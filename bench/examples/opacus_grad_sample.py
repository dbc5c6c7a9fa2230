"""Opacus' per-sample gradients, compressed by the flat masks that `Compressor` draws."""

import sys

import torch
import torch.nn.functional as F
from opacus import GradSampleModule

import dropinf
import dropinf_kernels as ops


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)).eval()
batch = torch.randn(8, 64), torch.randint(10, (8,))
compressor = dropinf.Compressor(model, dropinf.Dropout(dim=16, mode="flat"), loss_fn)
want, same = compressor.compress([batch]), True

model.train()  # Opacus' hooks do nothing in eval mode
loss_fn(GradSampleModule(model, loss_reduction="sum"), batch).sum().backward()
for name, plan in compressor.layers.items():
    whole = model.get_parameter(plan.parameter).grad_sample.flatten(1)  # [N, d_out * d_in]
    c = ops.sketch(whole, plan.out_axis.index)  # [N, k]
    same &= torch.allclose(c, want[name], rtol=1e-5, atol=1e-6 * float(want[name].abs().max()))
    print(f"{name}: opacus {tuple(c.shape)} against Compressor: {float((c - want[name]).abs().max()):.1e}")
sys.exit(not same)
