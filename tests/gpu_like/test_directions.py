"""Products with directions of a model on a GPU: the numbers of the CPU, from a direction that the host holds."""

from __future__ import annotations

import pytest
import torch

import dropinf
from tests.api.models import build
from tests.gpu_like.helpers import cast, near, on_gpu
from tests.gpu_like.pretend import move


# What autograd makes in C++, as the tangents of a bias, is not on the pretended GPU: these models need none of it.
@pytest.mark.parametrize(("name", "way"), [("tied", "forward"), ("tied", "backward"), ("sequence_mlp", "backward")])
def test_products_of_a_model_on_a_gpu(gpu, name, way):
    model, batch, loss_fn = build(name)
    model, batch = model.float(), cast(batch, torch.float32)
    compressor = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn)
    query = compressor.compress([batch])[:2]
    direction = dropinf.direction(query, dropinf.build_fisher(query), compressor)
    want = dropinf.rerank(model, [batch], direction, loss_fn, way=way)
    move(model)
    moved = dropinf.Direction(direction._parts, dropinf.Compressor(model, dropinf.Dropout(3), loss_fn).origin().model)
    got = dropinf.rerank(model, [on_gpu(batch)], moved, loss_fn, way=way)
    assert got.device.type == "cpu"
    near(got, want, 10)
