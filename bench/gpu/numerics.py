"""Whether what a GPU computes is right: every op against float64, and rows of models against one backward a sample."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dropinf
import dropinf_kernels as ops
from tests.gpu.problems import DTYPES, check, problems, results

from .clock import Machine
from .extraction import check_on_hooks
from .models import WORKLOADS, Workload
from .steps import Step

# How far a row may be from float64's, beside the largest layer's: what rounding of a backward in this dtype explains.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def op(machine: Machine, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compare every problem of an op with float64, thrice: as recorded, done again, and again with other values."""
    found = [p for p in problems(dtype, machine.size(1, 16)).values() if p.op == name]
    for problem in found:
        for _ in range(2):
            check(problem, results(getattr(ops, name), problem.on(machine.device)))
        results(getattr(ops, name), problem.fresh(machine.device))
        check(problem, results(getattr(ops, name), problem.on(machine.device)))
    if not found:
        raise RuntimeError(f"{name}: no problem of it is known")
    return {"problems": len(found)}


def expected(work: Workload, compressor: dropinf.Compressor) -> dict[str, Tensor]:
    """Return each layer's compressed gradients [N, *shape] by one backward a sample, in float64 on the CPU."""
    model = copy.deepcopy(work.model).cpu().double()
    parameters = dict(model.named_parameters())
    inputs, targets = (x.cpu() for x in work.batches[0])
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    found: dict[str, list[Tensor]] = {name: [] for name in compressor.layers}
    for n in range(len(inputs)):
        loss = work.loss_fn(model, (inputs[n : n + 1], targets[n : n + 1])).sum()
        names = [layer.parameter for layer in compressor.layers.values()]
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
        for (name, layer), g in zip(compressor.layers.items(), gradients, strict=True):
            found[name].append(layer.to(torch.device("cpu")).compress_exact(g[None]))
    return {name: torch.cat(rows) for name, rows in found.items()}


def rows(machine: Machine, make: Callable[..., Workload], dtype: torch.dtype, group: int) -> dict[str, Any]:
    """Return how far the rows of a small model are from float64's, of the largest layer's size."""
    work = make(replace(machine, dry=True), 1)
    work.model.to(dtype)
    batch = tuple(x.to(dtype) if x.is_floating_point() else x for x in work.batches[0])
    work = replace(work, batches=[batch])
    compressor = dropinf.Compressor(work.model, dropinf.Dropout(8, group=group), work.loss_fn, layers=work.layers)
    found, want = compressor.compress(work.batches), expected(work, compressor)
    check_on_hooks(compressor)
    largest = max(float(g.norm()) for g in want.values())
    errors = {name: float((found[name].cpu().double() - g).norm()) / largest for name, g in want.items()}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= ROUNDING[dtype]:
        raise RuntimeError(f"{worst} is {errors[worst]:.3g} from float64's, of the largest layer's size: {errors}")
    return {"worst": errors[worst], "layers": len(errors), "audits": len(compressor.audits)}


def index(machine: Machine, dtype: torch.dtype) -> dict[str, Any]:
    """Write an index from the GPU, read it, score on the GPU: as rows in memory, to the rounding of what is stored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 10)).to(machine.device)
    batches = [torch.randn(16, 5, 32, device=machine.device) for _ in range(machine.size(40, 4))]
    compressor = dropinf.Compressor(model, dropinf.Dropout(16), lambda m, x: m(x).square().sum((1, 2)))
    train = compressor.compress(batches, device=machine.device)
    query = compressor.compress(batches[:1], device=machine.device)
    with tempfile.TemporaryDirectory() as folder:
        stored = compressor.compress(batches, out=Path(folder) / "index", dtype=dtype, fisher="block")
        if damage := stored.verify():
            raise RuntimeError(f"the index is not sound: {damage}")
        scores = dropinf.score(query, stored, stored.fisher()), dropinf.score(query, stored, kind="dot")
    fisher = dropinf.build_fisher(train, "block")
    plain = dropinf.score(query, train, fisher), dropinf.score(query, train, kind="dot")
    apart = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(scores, plain, strict=True))
    if not apart <= {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.int8: 5e-2}[dtype]:
        raise RuntimeError(f"scores from the index are {apart:.3g} from those of rows in memory")
    return {"worst": apart, "samples": len(train)}


def steps(machine: Machine) -> list[Step]:
    names = sorted({p.op for p in problems(torch.float32, machine.size(1, 16)).values()})
    kinds = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int8: "int8"}
    found = []
    for dtype in DTYPES:
        for name in names:
            run = partial(op, name=name, dtype=dtype)
            found.append(Step(f"{name}, {kinds[dtype]}", "numerics of ops", run, 180.0, run))
    for name, make in WORKLOADS.items():
        for dtype in ROUNDING:
            for group in (1, 8):
                run = partial(rows, make=make, dtype=dtype, group=group)
                where = f"rows of a small {name}, {kinds[dtype]}, runs of {group}"
                found.append(Step(where, "numerics of rows", run, 120.0, run))
    return found + [
        Step(f"an index, {kinds[dtype]}", "numerics of rows", partial(index, dtype=dtype), 120.0)
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    ]
