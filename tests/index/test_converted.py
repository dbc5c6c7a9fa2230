"""Rows as they are stored, converted where they are and carried as one piece of memory."""

from __future__ import annotations

import pytest
import torch

from dropinf.index.codec import Codec

WIDTHS = (300, 16, 3, 100, 1, 256, 17)


def codec(dtype, sizes=None):
    return Codec(dtype, tuple(f"layer {i}" for i in range(len(WIDTHS))), WIDTHS, sizes)


CODECS = {
    **{dtype: (dtype, None) for dtype in ("float64", "float32", "bfloat16", "float16", "int8")},
    "int8 of the first version": ("int8", (1.0, 2.0, 0.5, 3.0, 1.0, 1.0, 2.0)),
}


@pytest.mark.parametrize("computed", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("n", [1, 5])
def test_one_piece_of_memory_gives_what_was_converted(n, name, computed):
    torch.manual_seed(0)
    flat, kind = torch.randn(n, sum(WIDTHS), dtype=computed), codec(*CODECS[name])
    converted = kind.convert(flat)
    data, unpacked = converted.packed()
    assert data.dtype == torch.uint8
    assert data.ndim == 1
    back = unpacked(data.clone())
    kind.check(back)
    assert back.kept.keys() == kind.tensors.keys()
    for part, (dtype, shape) in kind.tensors.items():
        assert back.kept[part].dtype == dtype
        assert back.kept[part].shape == (n, *shape)
        assert torch.equal(back.kept[part], kind.encode(flat)[part])
    carried = sum(x.numel() * x.element_size() for x in converted.kept.values())
    assert len(data) <= carried + 2 * n * len(WIDTHS) * 8  # and what tells whether that holds the rows


@pytest.mark.parametrize(("name", "value"), [("int8", 1e39), ("bfloat16", 1e39), ("float16", 1e39), ("float32", 1e39)])
def test_what_a_dtype_cannot_hold_is_told_behind_the_copy(name, value):
    flat, kind = torch.ones(3, sum(WIDTHS), dtype=torch.float64), codec(name)
    flat[1, 310] = value
    _, unpacked = kind.convert(flat).packed()
    data, _ = kind.convert(flat).packed()
    with pytest.raises(ValueError, match=rf"dtype: {name} cannot hold the gradient of sample 1 in layer 'layer 1'"):
        kind.check(unpacked(data))
