"""int8 rows with a scale each, and the form of an op that quantizes its result."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import ParamSpec

import torch
from torch import Tensor

from ..op import Op, op
from .checks import check_float
from .plain import accumulator

P = ParamSpec("P")


def check_quantized(q: Tensor, scale: Tensor) -> None:
    if q.dtype != torch.int8 or q.dim() != 2:
        raise TypeError(f"q is {q.dtype} {list(q.shape)}; it must be int8 [N, K]")
    if scale.dtype != torch.float32 or scale.shape != q.shape[:1]:
        raise ValueError(
            f"scale is {scale.dtype} {list(scale.shape)}; it must be float32 [N] with q's N = {q.shape[0]}"
        )


def _int8_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@op(lambda c: _int8_like(c.x))
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 with one scale, symmetric: `q = round(x / scale)`, `scale = max|x| / 127`.

    x [N, K] float -> q int8 [N, K], scale float32 [N]; a zero row has scale 0 and q 0.
    Raises ValueError naming the first row with a value that is not finite.
    Source: absmax quantization per row (LLM.int8(), arXiv 2208.07339, section 2).
    """
    check_float("x", x, 2)
    if x.shape[1] == 0:
        return x.new_empty(x.shape, dtype=torch.int8), x.new_zeros(x.shape[0], dtype=torch.float32)
    wide = x.to(accumulator(x))
    low, high = torch.aminmax(wide, dim=1)
    scale = (torch.maximum(-low, high) / 127).float()
    bad = (~torch.isfinite(scale)).nonzero()
    if bad.numel():
        raise ValueError(f"x is not finite, or beyond float32, in row {int(bad[0])} ({bad.shape[0]} such rows)")
    divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    q = (wide / divisor).round_().clamp_(-127, 127).to(torch.int8)
    return q, scale


@op(lambda c: c.q.new_empty(c.q.shape, dtype=c.dtype))
def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `q * scale[:, None]` in `dtype`, the inverse of quantize_rows up to half a scale.

    q int8 [N, K], scale float32 [N] -> [N, K].
    Raises TypeError, ValueError for bad dtypes or shapes.
    Source: see quantize_rows.
    """
    check_quantized(q, scale)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return q.to(wide).mul_(scale.to(wide).unsqueeze(1)).to(dtype)


def quantized(compress: Op[P, Tensor]) -> Op[P, tuple[Tensor, Tensor]]:
    """Declare `<name>_int8`, which compresses as `compress` does and then quantizes the row of each sample."""
    name, plain, quantize = compress.__name__, inspect.unwrap(compress.plain), inspect.unwrap(quantize_rows.plain)

    @functools.wraps(plain)
    def body(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, Tensor]:
        wide = plain(*args, **kwargs)
        q, scale = quantize(wide.flatten(1))
        return q.view(wide.shape), scale

    signature = inspect.signature(plain)
    parameters = [p for p in signature.parameters.values() if p.name != "dtype"]
    returned = "tuple[Tensor, Tensor]"
    vars(body)["__signature__"] = signature.replace(parameters=parameters, return_annotation=returned)
    body.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": returned}
    body.__name__ = body.__qualname__ = f"{name}_int8"
    body.__doc__ = f"""Compress as {name} does, and quantize each sample as quantize_rows does, in one pass.

    Takes what {name} takes, but no `dtype`. Returns int8 values of the same shape and the scale of each
    sample, float32 [N]; a gradient that is not finite has scale NaN and values 0 on a GPU, and raises ValueError
    elsewhere. Raises as {name}.
    Source: see {name} and quantize_rows.
    """

    def fake(c: SimpleNamespace) -> tuple[Tensor, Tensor]:
        return _int8_like(compress.fake(**vars(c)))

    return op(fake)(body)
