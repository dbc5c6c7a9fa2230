"""The op itself, in code that has a layer's activations and output gradients already."""

import sys

import torch
import torch.nn.functional as F

import dropinf  # registers torch.ops.dropinf.*, as dropinf_kernels alone does


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 10)).eval()
batch = torch.randn(8, 16, 32), torch.randint(10, (8,))

out = model[0](batch[0])
losses = F.cross_entropy(model[1:](out).mean(1), batch[1], reduction="none")
a, (g,) = batch[0], torch.autograd.grad(losses.sum(), out)  # [N, T, d_in], [N, T, d_out]

compressor = dropinf.Compressor(model, dropinf.Dropout(dim=8), loss_fn, layers="0")
plan = compressor.layers["0"]
c = torch.ops.dropinf.compress_linear(a, g, plan.in_axis.index, None, plan.out_axis.index, None)

want = compressor.compress([batch])["0"]
print(f"compress_linear {tuple(c.shape)} against Compressor: largest difference {float((c - want).abs().max()):.1e}")
sys.exit(not torch.allclose(c, want, rtol=1e-5, atol=1e-6 * float(want.abs().max())))
