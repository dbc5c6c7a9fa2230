"""dattri-llm with our config beside its own at equal size: times and memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dattri_llm import (
    REGISTER_ALL,
    HookManager,
    HookManagerConfig,
)
from dattri_llm.gradient import ops

import dropinf
from dropinf.interop.dattri_llm import sketched
from tests.interop.dattri_llm.models import (
    THEIRS,
    Pooled,
    close,
    gaussian,
)

# Its backward hook on the first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.mark.parametrize("style", THEIRS)
def test_capture_beside_its_projections_of_equal_size(style, compare):
    torch.manual_seed(0)
    model, x, y = Pooled(), torch.randn(8, 128, 512), torch.randint(512, (8,))

    def capture(config):
        own = copy.deepcopy(model)
        manager = HookManager(own, config=config)

        def step():
            own.zero_grad()
            with manager.collect():
                F.cross_entropy(own(x), y, reduction="sum").backward()
                return manager.get_gradient().data

        return step

    plain = HookManagerConfig(linear_io=REGISTER_ALL, capture_style="materialized")
    projection = {"projector": gaussian, "projection_kwargs": {"__default__": THEIRS[style]}}
    theirs = capture(HookManagerConfig(linear_io=REGISTER_ALL, capture_style="materialized", **projection))
    for sketch in (dropinf.Dropout(64), dropinf.Dropout(64, group=16)):
        ours = capture(sketched(plain, model, sketch))
        compressor = dropinf.Compressor(model, sketch, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
        wanted, found, other = compressor.compress([(x, y)]), ours(), theirs()
        for name in ("up", "down"):
            assert found[name].shape == (8, 64 * 65)
            assert other[name].numel() // 8 in (64 * 64, 64 * 65)
            close(found[name].unflatten(1, (64, 65))[:, :, :64], wanted[name])
        name = f"mask 64x64{', runs of 16,' if sketch.group > 1 else ''}"
        what = f"forward, backward and capture, 512-2048-512, 8 x 128 positions: {name} against {style} of equal size"
        compare("dattri-llm", what, ours, theirs, 9)


@pytest.mark.parametrize("style", THEIRS)
def test_projection_alone_beside_its_own(style, compare):
    """Of one layer, 512 -> 2048 with a bias, on the same inputs and output gradients."""
    torch.manual_seed(0)
    model, x, g = Pooled(), torch.randn(8, 128, 512), torch.randn(8, 128, 2048)

    def product(projector, **options):
        made = {
            side: projector.resolve(
                t.shape[-1], proj_seed=seed, include_bias=bool(seed), device="cpu", dtype=t.dtype, **options
            )
            for side, t, seed in (("a", x, 1), ("g", g, 0))
        }
        assert all(hasattr(matrix.matrix, "axis") == ("layer" in options) for matrix in made.values())
        return lambda: ops.materialize_factors(made["a"](x), made["g"](g), "nn.Linear")

    their = ops.DattriProjector(gaussian)
    if style == "mask":
        theirs = lambda: ops.mask_factors(x, g, "nn.Linear", their, {"has_bias": True}, proj_dim=64 * 65)  # noqa: E731
    else:
        theirs = product(their, proj_dim=64)
    whole = torch.cat([torch.einsum("bto,bti->boi", g, x), g.sum(1).unsqueeze(2)], 2)
    for sketch in (dropinf.Dropout(64), dropinf.Dropout(64, group=16)):
        config = sketched(HookManagerConfig(linear_io=["up"]), model, sketch)
        ours = product(ops.DattriProjector(config.projector), **config.projection_kwargs["up"] | {"style": None})
        plan = dropinf.Compressor(model, sketch, lambda *_: None, layers=["up.weight"]).layers["up"]
        kept = plan.out_axis.apply(whole.mT).mT
        wanted = torch.cat([plan.in_axis.apply(kept[:, :, :512]), kept[:, :, 512:]], 2)
        close(ours(), wanted.flatten(1))
        name = f"mask 64x64{', runs of 16,' if sketch.group > 1 else ''}"
        what = f"projection alone, 512-2048, 8 x 128 positions: {name} against {style} of equal size"
        compare("dattri-llm", what, ours, theirs, 9)
