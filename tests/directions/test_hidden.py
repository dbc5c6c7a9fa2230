"""What hides from a sum over a batch, and other numbers that were wrong without an error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf import measure


def linear(n: int = 8) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    weights = torch.tensor([1.0] * (n - 1) + [1e-4])
    return nn.Linear(6, 4), (torch.randn(n, 6), torch.randint(0, 4, (n,)), weights)


def entropy(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def weighted(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The last sample's weight is small, and made where autograd does not look; forward mode does."""
    output = model(batch[0])
    with torch.no_grad():
        p = output.softmax(1).gather(1, batch[1][:, None])[:, 0]
    return torch.where(batch[2] < 1, batch[2] * p, 1.0) * F.cross_entropy(output, batch[1], reduction="none")


def along(model: nn.Module, queries: int = 1) -> dropinf.Direction:
    return dropinf.Direction.dense({n: torch.randn(queries, *p.shape) for n, p in model.named_parameters()}, model)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_small_sample_does_not_hide_behind_large_ones(queries):
    model, batch = linear()
    direction = along(model, queries)
    expected = dropinf.rerank(model, [batch], direction, weighted, way="backward")
    with pytest.warns(UserWarning, match="forward mode does not serve this model"):
        found = dropinf.rerank(model, [batch], direction, weighted)
    torch.testing.assert_close(found, expected)
    with pytest.raises(dropinf.AttributionError, match="forward mode is not right here"):
        dropinf.rerank(model, [batch], direction, weighted, way="forward")


def test_weights_that_change_between_batches_are_refused():
    model, batch = linear()

    def batches():
        yield batch
        with torch.no_grad():
            model.weight.mul_(3)
        yield batch

    with pytest.raises(ValueError, match="its weights changed while rerank read batches"):
        dropinf.rerank(model, batches(), along(model), entropy)


def test_losses_are_one_a_sample_and_depend_on_the_model():
    model, batch = linear()
    for loss, message in (
        (lambda m, b: entropy(m, b)[:5], "5 losses"),
        (lambda m, b: entropy(m, b).detach(), "do not depend on any parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            dropinf.rerank(model, [batch], along(model), loss)
    with pytest.raises(ValueError, match="direction has no queries"):
        dropinf.rerank(model, [batch], along(model)[0:0], entropy)


def test_a_tied_parameter_is_named_once():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="two names are of one parameter"):
        dropinf.Direction.dense({"0.weight": torch.randn(1, 5, 5), "1.weight": torch.randn(1, 5, 5)}, model)


def test_every_byte_of_a_file_of_directions_counts(tmp_path):
    model, batch = linear()
    compressor = dropinf.Compressor(model, dropinf.Dropout(3), entropy)
    for made in (along(model), dropinf.direction(compressor.compress([batch]), None, compressor)):
        made.save(tmp_path / "d")
        data = (tmp_path / "d").read_bytes()
        for place in range(0, len(data), 41):
            changed = bytearray(data)
            changed[place] ^= 1
            (tmp_path / "d").write_bytes(changed)
            with pytest.raises(ValueError, match="not a whole file"):
                dropinf.Direction.load(tmp_path / "d")


def test_arithmetic_is_not_in_half_precision():
    model, batch = linear()
    half = dropinf.Direction.dense({n: torch.randn(1, *p.shape).half() for n, p in model.named_parameters()}, model)
    small = dropinf.rerank(model, [batch], half * 1e-9, entropy)
    torch.testing.assert_close(small * 1e9, dropinf.rerank(model, [batch], half, entropy), rtol=1e-3, atol=1e-6)


def test_a_probe_reads_before_an_op_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Linear(7, 4))
    x, v = torch.randn(5, 6), torch.randn(7)
    torch.testing.assert_close(measure.probe("0", v)(model, (x,)), model[0](x) @ v)


def test_what_does_not_count_is_no_part_of_a_completion():
    torch.manual_seed(0)
    ids, starts = torch.randint(0, 9, (3, 6)), torch.tensor([2, 3, 2])
    logits = torch.randn(3, 6, 9)
    expected = measure.completion(lambda _, batch: logits)(nn.Linear(1, 1), (ids, starts))
    spoiled = logits.clone()
    spoiled[:, 0] = -torch.inf  # of a prompt's token
    found = measure.completion(lambda _, batch: spoiled)(nn.Linear(1, 1), (ids, starts))
    torch.testing.assert_close(found, expected)
    ids[1, 4] = -100
    with pytest.raises(ValueError, match="an id of a completion is none of 9 words"):
        measure.completion(lambda _, batch: logits)(nn.Linear(1, 1), (ids, starts))
    with pytest.raises(ValueError, match="they must lie within 9 classes"):
        measure.margin(lambda _, batch: logits[:, 0])(nn.Linear(1, 1), (ids, torch.tensor([1, 9, 2])))
