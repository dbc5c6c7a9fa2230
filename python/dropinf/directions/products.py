"""The product of each loss's gradient with a direction: in forward mode, or by differentiating a backward.

Forward mode: with the parameters' tangent v, the tangent of loss n is ``<grad l_n, v>``. Backward: ``g(u)``, the
gradient of ``sum_n u_n l_n``, is linear in u, and the derivative of ``<g(u), v>`` by ``u_n`` is the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Named = Mapping[str, Tensor]


def forward_product(
    model: nn.Module, losses_of: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter], v: Named
) -> tuple[Tensor, Tensor]:
    """Return the losses and their products with one direction, of the same shape, by one forward with tangents.

    Raises NotImplementedError, or whatever else the model does, where an op of it has no forward mode.
    """
    with torch.no_grad(), differentiable(model), forward_ad.dual_level():
        duals = {id(p): forward_ad.make_dual(p.detach(), v[name]) for name, p in parameters.items()}
        with _in_place(model, duals):
            primal, tangent = forward_ad.unpack_dual(losses_of())
        return primal.clone(), torch.zeros_like(primal) if tangent is None else tangent.clone()


def backward_products(
    model: nn.Module,
    losses_of: Callable[[], Tensor],
    parameters: Mapping[str, nn.Parameter],
    directions: Iterable[Named],
) -> tuple[Tensor, list[Tensor]]:
    """Return the losses and their products with each direction, by a backward that is differentiated.

    The parameters must require gradients. Raises RuntimeError where the backward of an op cannot be differentiated.
    """
    found = []
    with torch.enable_grad(), differentiable(model):
        losses = losses_of()
        u = torch.ones_like(losses, requires_grad=True)
        gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if losses.requires_grad:
            gradients = torch.autograd.grad(losses, list(parameters.values()), u, create_graph=True, allow_unused=True)
        for v in directions:
            both = [(g, v[name]) for name, g in zip(parameters, gradients, strict=True) if g is not None]
            parts = [(g.to(x.dtype) * x).sum().to(u.device) for g, x in both if g.requires_grad]
            total = torch.stack(parts).sum() if parts else None
            if total is None:
                found.append(torch.zeros_like(losses))
            else:
                found.append(torch.autograd.grad(total, u, retain_graph=True, materialize_grads=True)[0])
    return losses.detach(), found


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Run attention and recurrent layers inside by kernels that have forward mode, and a backward to differentiate."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def _in_place(model: nn.Module, duals: Mapping[int, Tensor]) -> Iterator[None]:
    """Have modules hold these tensors inside, by ids of the parameters that they stand for."""
    held = [module._parameters for module in model.modules() if isinstance(module._parameters, dict)]
    before = [(where, name, p) for where in held for name, p in where.items() if id(p) in duals]
    try:
        for where, name, p in before:
            where[name] = duals[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for where, name, p in before:
            where[name] = p
