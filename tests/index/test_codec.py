"""How rows are stored: scales by row and layer, the bytes that they take, and values that a dtype cannot hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf.index import products
from dropinf.index.codec import Codec
from dropinf.index.products import Products, Stored
from tests.index.fixtures import make_fixtures as made

FIXTURES = Path(__file__).parent / "fixtures"
WIDTHS = (3, 300, 16, 16, 255, 1, 64)
NAMES = tuple("abcdefg")


def layer_errors(found: torch.Tensor, wanted: torch.Tensor, widths: tuple[int, ...] = WIDTHS) -> torch.Tensor:
    """The error of each row and layer, as a share of its largest number."""
    parts = zip(found.double().split(widths, 1), wanted.double().split(widths, 1), strict=True)
    return torch.stack([(a - b).abs().amax(1) / b.abs().amax(1) for a, b in parts], 1)


def back(codec: Codec, flat: torch.Tensor) -> torch.Tensor:
    kept = codec.encode(flat)
    assert {n: (x.dtype, x.shape[1:]) for n, x in kept.items()} == codec.tensors
    assert sum(x.nbytes for x in kept.values()) == len(flat) * codec.row_bytes
    return codec.decode(kept["gradients"], kept.get("scale"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_layer_of_int8_depends_on_no_other(dtype):
    torch.manual_seed(0)
    sizes = torch.tensor([1, 1e-30, 1e30, 1e-8, 1, 1e5, 1e-3], dtype=torch.float64)
    flat = torch.cat([torch.randn(9, k) * size for k, size in zip(WIDTHS, sizes, strict=True)], 1).to(dtype)
    codec = Codec("int8", NAMES, WIDTHS)
    found = back(codec, flat)
    assert layer_errors(found, flat).max() <= 1 / 126  # one step; half of one where no bits are carried
    assert layer_errors(found, flat)[:, [0, 1, 5]].max() <= 0.5 / 126
    assert torch.equal(back(codec, flat[4:5]), found[4:5])
    flat[:, :3] = 0
    changed = back(codec, flat)
    assert not changed[:, :3].any()
    assert torch.equal(changed[:, 3:], found[:, 3:])


@pytest.mark.parametrize("layers", [1, 2, 50])
@pytest.mark.parametrize("width", [16, 17, 255, 256, 4096])
def test_scales_by_layer_take_under_one_percent(width, layers):
    before = width * layers + 4  # with one scale a row
    assert Codec("int8", tuple(map(str, range(layers))), (width,) * layers).row_bytes <= 1.01 * before


def test_the_ends_of_the_range_are_kept():
    """Every largest number, of either sign, whatever the bits of its scale."""
    codec = Codec("int8", ("a",), (16,))
    for first, last, steps in ((-35, 38, 126), (-37.9, -35, 63)):  # below 1e-36 a bfloat16 has fewer bits
        sizes = torch.logspace(first, last, 4000, dtype=torch.float64).float()
        flat = sizes.unsqueeze(1) * torch.linspace(-1, 1, 16)
        assert layer_errors(back(codec, flat), flat, (16,)).max() <= 1 / steps
    tiny = torch.full((1, 16), 1e-44)  # below what float32 computes with
    assert back(codec, tiny).abs().max() < 1e-38


@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_by_layer(queries, dtype):
    torch.manual_seed(0)
    codec = Codec("int8", NAMES, WIDTHS)
    scales = torch.cat([torch.full((k,), 10.0 ** (3 * i - 9)) for i, k in enumerate(WIDTHS)])
    flat = torch.randn(5000, sum(WIDTHS)) * scales
    q = (torch.randn(queries, sum(WIDTHS)) / scales).to(dtype)  # no layer's share is lost beside another's
    kept = codec.encode(flat)
    rows = Stored(kept["gradients"], codec.scales(kept["gradients"], kept["scale"]))
    wanted = q.double() @ codec.decode(kept["gradients"], kept["scale"]).double().T
    for found in (Products(q, WIDTHS).dot(rows), Products(q.double(), WIDTHS).dot(rows).to(dtype)):
        assert (found.dtype, found.shape) == (dtype, wanted.shape)
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-6


PATTERNS = {
    "narrow": (16,) * 40,
    "narrower": (3,) * 40,
    "weights and biases": (64, 5) * 9,
    "blocks": (7, 64, 20, 64) * 5 + (9,),
    "wide": (2000, 1030),
    "wide and narrow": (1024, 8, 1500, 8, 20, 300),
}


@pytest.mark.parametrize("held", [300, 1 << 20])
@pytest.mark.parametrize("queries", [1, 4, 5, 70])
@pytest.mark.parametrize("widths", PATTERNS.values(), ids=PATTERNS)
def test_products_of_patterns_of_layers(widths, queries, held, monkeypatch):
    """Also where few rows and columns are decoded at a time, so that tiles end within layers."""
    monkeypatch.setattr(products, "_DECODED", held * 32)
    torch.manual_seed(0)
    codec = Codec("int8", tuple(map(str, range(len(widths)))), widths)
    sizes = torch.repeat_interleave(torch.logspace(-8, 8, len(widths)), torch.tensor(widths))
    kept = codec.encode(torch.randn(150, sum(widths)) * sizes)
    scales = codec.scales(kept["gradients"], kept.get("scale"))
    q = torch.randn(queries, sum(widths)) / sizes
    decoded = kept["gradients"].double() * scales.double().repeat_interleave(torch.tensor(widths), 1)
    torch.testing.assert_close(codec.decode(kept["gradients"], kept.get("scale")).double(), decoded, rtol=1e-7, atol=0)
    found = Products(q, widths).dot(Stored(kept["gradients"], scales))
    wanted = q.double() @ decoded.T
    assert (found.dtype, found.shape) == (torch.float32, wanted.shape)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-6


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(300, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.o(self.e(x).mean(1))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_a_first_batch_without_a_layer_costs_it_nothing(tmp_path):
    torch.manual_seed(0)
    compressor = dropinf.Compressor(Embedded().eval(), dropinf.Dropout(8), loss_fn)
    kept = compressor.layers["e"].in_axis.index.flatten()
    others = torch.tensor(sorted(set(range(300)) - set(kept.tolist())))
    first = (others[torch.randint(len(others), (8, 12))], torch.randint(3, (8,)))
    batches = [first, *((torch.randint(300, (8, 12)), torch.randint(3, (8,))) for _ in range(20))]
    rows = compressor.compress(batches)
    assert not rows["e"][:8].any()
    index = compressor.compress(batches, out=tmp_path / "idx", dtype=torch.int8)
    for name in rows.shapes:
        assert float((index[:][name] - rows[name]).norm() / rows[name].norm()) < 0.02
    fisher = dropinf.build_fisher(rows)
    for top in (None, 5):
        found, wanted = (dropinf.score(rows[:4], source, fisher, top=top) for source in (index, rows))
        if top is not None:
            found, wanted = found.values, wanted.values
        assert float((found - wanted).norm() / wanted.norm()) < 0.03
    best = dropinf.score(rows[:4], index, kind="dot", top=168)
    whole = dropinf.score(rows[:4], index[:], kind="dot").sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(best.values, whole.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "dtype", "layers", "layer", "value"),
    [
        ("float32", torch.float64, (1.0, 1e300), "b", "1e.300"),
        ("float32", torch.float64, (1e-50, 1.0), "a", "1e-50"),
        ("bfloat16", torch.float32, (1.0, 3.4e38), "b", r"3.4e\+38"),
        ("bfloat16", torch.float64, (1e-40, 1.0), "a", "1e-40"),
        ("float16", torch.float32, (1e-6, 1.0), "a", "1e-06, beside 1 in other layers"),
        ("float16", torch.float64, (1e-7, 1.0), "a", "1e-07, beside 1 in other layers"),
        ("float16", torch.float64, (1.0, 1e200), "b", r"1e\+200"),
        ("int8", torch.float64, (1.0, 1e39), "b", r"1e\+39"),
        ("int8", torch.float64, (1e-40, 1.0), "a", "1e-40"),
    ],
)
def test_what_a_dtype_cannot_hold_names_sample_and_layer(stored, dtype, layers, layer, value):
    codec = Codec(stored, ("a", "b"), (2, 3))
    rows = torch.ones(6, 5, dtype=dtype)
    back(codec, rows)
    rows[4, :2], rows[4, 2:] = layers
    message = rf"dtype: {stored} cannot hold the gradient of row 4 of 7 in layer '{layer}', whose .* {value}"
    with pytest.raises(ValueError, match=message):
        codec.encode(rows, lambda row: f"row {row} of 7")


def test_rounding_beside_other_layers_is_no_gradient():
    """Such as queries and keys have for a passage of one token; in float64 it would be a gradient."""
    rows = torch.ones(2, 5)
    rows[0, :2] = 1.3e-7
    kept = back(Codec("float16", ("a", "b"), (2, 3)), rows)
    assert float((kept - rows).abs().max()) < 1e-7
    assert torch.equal(kept[1], rows[1])


def test_a_run_names_the_sample_that_a_dtype_cannot_hold(tmp_path):
    batches = [(torch.randn(4, 6).double(), torch.randint(3, (4,))) for _ in range(5)]
    weight = torch.ones(4, dtype=torch.float64)
    weight[2] = 1e60
    heavy = lambda m, b: loss_fn(m, b) * (weight if b is batches[3] else 1)  # noqa: E731
    compressor = dropinf.Compressor(nn.Sequential(nn.Linear(6, 3)).double(), dropinf.Dropout(3), heavy, audit="never")
    with pytest.raises(ValueError, match="float32 cannot hold the gradient of sample 2 of batch 3 in layer '0'"):
        compressor.compress(batches, out=tmp_path / "idx", dtype=torch.float32)


def test_an_int8_index_of_the_first_version_refuses_what_it_would_lose(tmp_path):
    """It goes on with one scale a row."""
    data, folder = made.Data(FIXTURES), shutil.copytree(FIXTURES / "int8", tmp_path / "int8")
    before = dropinf.Index.open(folder)
    assert before.bytes_per_sample == sum(before.manifest.codec.widths) + 4
    heavy = lambda m, b: made.loss_fn(m, b) * 1e30  # noqa: E731
    model = data.compressor().model
    same = dropinf.Compressor(model, dropinf.Dropout(3, seed=2), heavy)
    after = same.compress(data.queries, out=folder, append=True, ids=made.names)
    assert torch.equal(after[: len(before)].flat, before[:].flat)
    rows = same.compress(data.queries).flat
    assert float((after[len(before) :].flat - rows).norm() / rows.norm()) < 0.02
    small = lambda m, b: made.loss_fn(m, b) + 1e9 * m[3].bias.square().sum()  # noqa: E731
    lost = dropinf.Compressor(model, dropinf.Dropout(3, seed=2), small, mixing=True)
    with pytest.raises(
        ValueError, match=r"int8 cannot hold the gradient of sample 0 of batch 0 in layer '0', .* beside"
    ):
        lost.compress(data.queries[::-1], out=folder, append=True, ids=made.names)
