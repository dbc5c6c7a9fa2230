"""Digits, a model of them, and what LogIX logs of it."""

from __future__ import annotations

import logix
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import dropinf


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def digits(kind="mlp"):
    """A model that classifies digits, and them in float64."""
    data = load_digits()
    x, y = torch.from_numpy(data.data) / 16, torch.from_numpy(data.target)
    torch.manual_seed(0)
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    elif kind == "cnn":
        x = x.view(-1, 1, 8, 8)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, stride=2, padding=1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
    else:

        class Rows(nn.Sequential):
            def forward(self, x):
                return super().forward(x).mean(1)

        x = x.view(-1, 8, 8)
        model = Rows(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 10))
    return model.double().eval(), x, y


def batches_of(x, y, size=16):
    return list(zip(x.split(size), y.split(size), strict=True))


def collect(run, model, batches, *, hessian="raw", lora="none", masks=None):
    """LogIX's own loop over the training set."""
    for _ in logix.LogIXScheduler(run, lora=lora, hessian=hessian, save="grad"):
        done = 0
        for x, y in batches:
            ids = [str(i) for i in range(done, done + len(x))]
            done += len(x)
            with run(data_id=ids, mask=None if masks is None else masks(x)):
                loss_fn(model, (x, y)).sum().backward()
                model.zero_grad()
    run.finalize()
    run.eval()


def query_log(run, model, x, y):
    run.setup({"grad": ["log"]})
    with run(data_id=[f"q{i}" for i in range(len(x))]):
        loss_fn(model, (x, y)).sum().backward()
    return run.get_log(copy=True)


def scores_of(run, model, x, y, **options):
    """Its influence of every training sample on each query, in the order of the samples."""
    found = run.compute_influence_all(query_log(run, model, x, y), run.build_log_dataloader(), **options)
    order = torch.tensor([int(i) for i in found["tgt_ids"]]).argsort()
    return found["influence"][:, order]


def error_of(got, want):
    return float((got - want).abs().max() / want.abs().max())


SKETCHES = {
    "dropout": dropinf.Dropout(6),
    "runs": dropinf.Dropout((2, 4), group=2),
    "flat": dropinf.Dropout(12, mode="flat"),
    "gaussian": dropinf.Gaussian(6),
}


def factors_of(model, compressor, x, y):
    """Layer -> what the masks leave of its inputs and output gradients, [n, t, k] each."""
    seen, handles = {}, []
    for name in compressor.layers:

        def keep(module, args, out, name=name):
            seen[name] = args[0].detach(), out
            out.retain_grad()

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    loss_fn(model, (x, y)).sum().backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, plan in compressor.layers.items():
        module, (a, out) = model.get_submodule(name), seen[name]
        g = out.grad
        if isinstance(module, nn.Conv2d):
            a = F.unfold(a, module.kernel_size, padding=module.padding, stride=module.stride).mT
            g = g.flatten(2).mT
        rows, columns = plan.out_axis.index[0].long(), plan.in_axis.index[0].long()
        a, g = a[..., columns], g[..., rows]
        found[name] = (a, g) if a.ndim == 3 else (a[:, None], g[:, None])
    return found


def graph_of(loss):
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [child for child, _ in node.next_functions]
    return seen


def tensors_of(node):
    """What a node of the graph keeps: saved tensors, and those of a hook's closure."""
    cells = getattr(getattr(node, "call", None), "__closure__", None) or ()
    found = [getattr(node, n) for n in dir(node) if n.startswith("_saved_")] + [cell.cell_contents for cell in cells]
    return [t for t in found if isinstance(t, torch.Tensor)]
