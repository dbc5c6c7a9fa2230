"""Gradients: views, selection, storage on disk, and the check that two were made by one sketch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dropinf.builder import GradientsBuilder
from dropinf.gradients import Gradients, block_rows

SHAPES = {"fc": (3, 4), "bias": (3,), "head": (2, 5)}
DIGEST = {"fc": "aa", "bias": "bb", "head": "cc"}
K = 25


def make(n: int = 7, dtype: torch.dtype = torch.float32, seed: int = 0) -> Gradients:
    flat = torch.randn(n, K, generator=torch.Generator().manual_seed(seed))
    return Gradients(flat.to(dtype), SHAPES, DIGEST)


def test_layers_are_views_of_one_buffer() -> None:
    g = make()
    assert list(g.layers) == ["fc", "bias", "head"]
    assert {name: tuple(x.shape) for name, x in g.layers.items()} == {n: (7, *s) for n, s in SHAPES.items()}
    g["bias"].fill_(5.0)
    assert (g.flat[:, 12:15] == 5).all()
    assert torch.equal(g["head"][2, 1], g.flat[2, 20:25])
    assert g.bytes_per_sample == 100
    assert len(g) == 7


@pytest.mark.parametrize(
    "key",
    [
        slice(2, 5),
        slice(None, None, 2),
        slice(-1, None, -1),
        slice(5, 2),
        [4, 0, 0],
        [],
        torch.tensor([1, -1]),
        torch.tensor([True, False] * 3 + [True]),
        [True] + [False] * 6,
    ],
    ids=str,
)
def test_selection_agrees_with_plain_indexing(key: Any) -> None:
    g = make()
    rows = torch.arange(7).numpy()[key.numpy() if isinstance(key, torch.Tensor) else key if key != [] else slice(0)]
    part = g[key]
    assert torch.equal(part.flat, torch.stack([g.flat[i] for i in rows]) if len(rows) else g.flat[:0])
    assert part.digest == g.digest
    assert part.shapes == g.shapes


def test_one_sample_a_range_and_what_is_out_of_range() -> None:
    g = make()
    assert torch.equal(g[3].flat, g.flat[3:4])
    assert torch.equal(g[-1].flat, g.flat[6:])
    assert torch.equal(g[torch.tensor(3)].flat, g.flat[3:4])
    assert g[2:5].flat.data_ptr() == g.flat[2:].data_ptr()  # a view
    assert len(list(g)) == 7
    bad: Any
    for bad in (7, -8, [9], [True, False], torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(IndexError):
            g[bad]
    with pytest.raises(KeyError, match="no layer 'fd'; the layers are fc, bias, head"):
        g["fd"]
    assert len(Gradients(torch.empty(0, K), SHAPES, DIGEST)["fc"]) == 0


def test_blocks_cover_every_sample_once() -> None:
    g = make()
    blocks = list(g.blocks(3))
    assert [offset for offset, _ in blocks] == [0, 3, 6]
    assert torch.equal(torch.cat([b.flat for _, b in blocks]), g.flat)
    with pytest.raises(ValueError, match="rows is 0"):
        next(g.blocks(0))
    assert block_rows(g) == 4096
    wide = Gradients(torch.empty(0, 1 << 20), {"w": (1 << 10, 1 << 10)}, {"w": "a"})
    assert block_rows(wide) == 64


def test_to_changes_only_what_it_is_asked_for() -> None:
    g = make()
    assert g.to(torch.float32) is g
    half = g.to(torch.bfloat16, "cpu")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.flat, g.flat.bfloat16())
    assert half.bytes_per_sample == 50
    assert g.to("meta").device.type == "meta"


def test_cat_joins_and_refuses_other_sketches() -> None:
    g = make()
    assert torch.equal(Gradients.cat([g[:2], g[2:2], g[2:]]).flat, g.flat)
    other = Gradients(g.flat, SHAPES, {**DIGEST, "head": "ee"})
    with pytest.raises(ValueError, match=r"parts\[0\] and parts\[2\] differ: layer 'head' has the same shape but"):
        Gradients.cat([g, g, other])
    with pytest.raises(ValueError, match="parts is empty"):
        Gradients.cat([])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load_are_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    g = make(dtype=dtype)[1:6]
    g.flat[0, 0] = -0.0
    g.save(tmp_path / "g.safetensors")
    back = Gradients.load(tmp_path / "g.safetensors")
    assert back.dtype == dtype
    assert torch.equal(back.flat.view(torch.uint8), g.flat.view(torch.uint8))
    assert list(back.shapes.items()) == list(SHAPES.items())
    assert back.digest == DIGEST
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "g"
    make().save(path)
    before = path.read_bytes()

    def half_written(_: object, partial: Path, **__: object) -> None:
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("dropinf.gradients.save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        make(seed=1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["g"]


def test_load_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "g"
    with pytest.raises(FileNotFoundError):
        Gradients.load(path)
    make().save(path)
    whole = path.read_bytes()
    for size in (20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated or damaged"):
            Gradients.load(path)
    for text in (b"", b"hello, this is text\n" * 5):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"not a file that Gradients\.save wrote"):
            Gradients.load(path)
    tensors = {"gradients": torch.zeros(2, K)}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"a safetensors file, but not one that Gradients\.save wrote"):
        Gradients.load(path)
    header = {"format": "dropinf.gradients", "version": "2"}
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match="format version 2, newer than this dropinf reads"):
        Gradients.load(path)
    for layers in ("[[", json.dumps([["fc", [3, 4], "aa"]]), json.dumps([["fc"]]), json.dumps(3), "[" * 100_000):
        save_file(tensors, path, metadata={**header, "version": "1", "layers": layers})
        with pytest.raises(ValueError, match="the list of layers is damaged"):
            Gradients.load(path)
    save_file({"other": torch.zeros(2)}, path, metadata={**header, "version": "1", "layers": "[]"})
    with pytest.raises(ValueError, match="truncated or damaged"):
        Gradients.load(path)


@pytest.mark.parametrize(
    ("shapes", "digest", "message"),
    [
        ({"fc": (3, 4), "bias": (3,)}, {}, "layer 'head' is in query but missing from train"),
        ({**SHAPES, "new": (1,)}, {"new": "dd"}, "layer 'new' is in train but missing from query"),
        ({**SHAPES, "bias": (4,)}, {}, r"layer 'bias' is \(3,\) per sample in query but \(4,\) in train"),
        (SHAPES, {"bias": "zz", "head": "zz"}, "layer 'bias' has the same shape but different masks"),
        ({"bias": (3,), "fc": (3, 4), "head": (2, 5)}, {}, "query has layer 'fc' where train has 'bias'"),
    ],
)
def test_the_first_differing_layer_is_named(
    shapes: dict[str, tuple[int, ...]], digest: dict[str, str], message: str
) -> None:
    digests = {name: {**DIGEST, **digest}[name] for name in shapes}
    width = sum(torch.Size(s).numel() for s in shapes.values())
    other = Gradients(torch.zeros(2, width), shapes, digests)
    with pytest.raises(ValueError, match=f"query and train differ: {message}.*same Compressor"):
        make().check_same_sketch(other)
    make().check_same_sketch(make(3, seed=2))


@pytest.mark.parametrize(
    ("flat", "shapes", "digest", "message"),
    [
        (torch.zeros(2, K + 1), SHAPES, DIGEST, r"flat is \(2, 26\); it must be \[N, 25\]"),
        (torch.zeros(K), SHAPES, DIGEST, r"flat is \(25,\)"),
        (torch.zeros(2, K, dtype=torch.int8), SHAPES, DIGEST, "must be floating point"),
        (torch.zeros(K, 2).T, SHAPES, DIGEST, "must be contiguous"),
        (torch.zeros(2, 0), {}, {}, "shapes is empty"),
        (torch.zeros(2, K), SHAPES, {"fc": "aa"}, r"only one of them: \['bias', 'head'\]"),
        (torch.zeros(2, 8), {"w": (2, 2, 2)}, {"w": "a"}, r"shapes\['w'\] is \(2, 2, 2\)"),
        (torch.zeros(2, 0), {"w": (0,)}, {"w": "a"}, "sizes of at least 1"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    flat: torch.Tensor, shapes: dict[str, tuple[int, ...]], digest: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Gradients(flat, shapes, digest)


def test_repr_tells_size_and_layers() -> None:
    assert repr(make()) == (
        "Gradients(7 samples x 25, torch.float32, cpu, 3 layers: fc: (3, 4), bias: (3,), head: (2, 5))"
    )
    many = {f"l{i}": (1,) for i in range(9)}
    assert "9 layers: l0: (1,), l1: (1,), l2: (1,), ..., l8: (1,)" in repr(
        Gradients(torch.zeros(1, 9), many, dict.fromkeys(many, "a"))
    )


@pytest.mark.parametrize("capacity", [0, 3, 7, 20])
def test_builder_collects_batches(capacity: int) -> None:
    g = make()
    builder = GradientsBuilder(SHAPES, DIGEST, capacity=capacity, dtype=torch.float64)
    for start, stop in ((0, 2), (2, 2), (2, 3), (3, 7)):
        builder.append(dict(reversed(g[start:stop].layers.items())))
    buffer = builder._buffer.data_ptr()
    built = builder.finish()
    assert torch.equal(built.flat, g.flat.double())
    assert (built.flat.data_ptr() == buffer) == (capacity != 20)
    assert built.flat.untyped_storage().nbytes() <= 2 * 7 * K * 8
    assert len(builder) == 0


def test_builder_refuses_what_does_not_fit() -> None:
    builder = GradientsBuilder(SHAPES, DIGEST)
    layers = dict(make().layers)
    with pytest.raises(ValueError, match=r"missing \['bias'\], unknown \['beta'\]"):
        builder.append({"fc": layers["fc"], "head": layers["head"], "beta": layers["bias"]})
    with pytest.raises(ValueError, match=r"layer 'bias' is \(6, 3\); it must be \(7, 3\)"):
        builder.append({**layers, "bias": layers["bias"][:6]})
    with pytest.raises(ValueError, match="capacity is -1"):
        GradientsBuilder(SHAPES, DIGEST, capacity=-1)
    assert len(builder.finish()) == 0
