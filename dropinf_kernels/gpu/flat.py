"""Single entries of flattened per-sample gradients on a GPU, with the kernel of `norm.py`."""

from __future__ import annotations

from torch import Tensor

from ..op import launches
from ..ops.checks import ID_DTYPES
from ..ops.flat import check_flat, compress_flat, compress_flat_int8
from .launch import check_device, check_index
from .norm import launch_entries
from .replay import replayed
from .tiles import Side


@launches(compress_flat, compress_flat_int8)
@replayed
def launch_flat(
    a: Tensor, g: Tensor, rows: Tensor, cols: Tensor, cu_seqlens: Tensor | None = None, *, quantize: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Launch `compress_flat` on g's device."""
    check_flat(a, g, rows, cols, cu_seqlens)
    check_device(g=g, a=a, rows=rows, cols=cols)
    check_index("rows", rows, g.shape[-1])
    side = Side.of(g, g.shape[-1], rows.unsqueeze(0), None, 1)
    if a.dtype in ID_DTYPES:
        # Ids look like rows of width 1, so that both kinds of input have the same strides.
        return launch_entries("ids", a.unsqueeze(-1), g, side, cols.contiguous(), cu_seqlens, quantize)
    check_index("cols", cols, a.shape[-1])
    return launch_entries("dense", a, g, side, cols.contiguous(), cu_seqlens, quantize)
