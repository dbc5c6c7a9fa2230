"""Directions: S^T (F + lambda I)^{-1} c, written out with dense matrices, and the scores that they give."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dropinf
from tests.api.models import N, build
from tests.directions.cases import MODELS, QUERIES, SKETCHES, assert_near, make, products, spread


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("name", MODELS)
def test_product_with_gradients_is_the_score(name, sketch):
    case = make(name, sketch)
    direction = dropinf.direction(case.query, case.fisher, case.compressor)
    assert len(direction) == QUERIES
    assert set(direction.parameters) == {layer.parameter for layer in case.compressor.layers.values()}
    solved = case.fisher.solve(case.query)
    for layer in case.compressor.layers.values():
        for q in range(QUERIES):
            found = direction.tensor(layer.parameter, q)
            assert tuple(found.shape) == layer.shape
            torch.testing.assert_close(found, spread(layer, solved[layer.name][q]), rtol=1e-10, atol=1e-12)
    expected = dropinf.score(case.query, case.train, case.fisher)
    assert_near(products(case.model, case.loss_fn, case.batch, direction), expected, 1e-9)


def test_without_a_fisher_scores_are_dot_products():
    case = make("mlp", "dropout")
    direction = dropinf.direction(case.query, None, case.compressor)
    expected = dropinf.score(case.query, case.train, kind="dot")
    assert_near(products(case.model, case.loss_fn, case.batch, direction), expected, 1e-10)


def test_queries_are_selected_and_combined():
    case = make("sequence_mlp", "rank")
    d = dropinf.direction(case.query, case.fisher, case.compressor)
    contrast = d[0] - 2 * d[1] * 0.25 + -d[0:1]
    assert len(contrast) == 1
    for name in d.parameters:
        torch.testing.assert_close(contrast.tensor(name, 0), -0.5 * d.tensor(name, 1))
        torch.testing.assert_close(d[[1, 0]].tensor(name, 0), d.tensor(name, 1))
        torch.testing.assert_close(d[-1].tensor(name, -1), d.tensor(name, 1))


def test_whole_directions_are_as_they_were_given():
    model = build("mlp")[0]
    given = {name: torch.randn(3, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    d = dropinf.Direction.dense(given, model)
    assert d.shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert d.model == dropinf.Compressor(model, dropinf.Dropout(2), lambda m, b: m(b).sum(1)).origin().model
    assert all(torch.equal((d - 2 * d).tensor(n, q), -x[q]) for n, x in given.items() for q in range(3))


@pytest.mark.parametrize("sketch", ["dropout", "flat", "fold", "whitened", "gaussian", None])
def test_a_file_holds_it_bit_for_bit(sketch, tmp_path):
    case = make("gpt2", sketch or "dropout")
    d = dropinf.direction(case.query, case.fisher, case.compressor)
    if sketch is None:
        d = dropinf.Direction.dense(
            {n: torch.stack([d.tensor(n, q) for q in (0, 1)]) for n in d.parameters}, case.model
        )
    d.save(tmp_path / "d.safetensors")
    other = dropinf.Direction.load(tmp_path / "d.safetensors")
    assert (len(other), other.parameters, other.model, other.shapes) == (QUERIES, d.parameters, d.model, d.shapes)
    assert all(torch.equal(other.tensor(n, q), d.tensor(n, q)) for n in d.parameters for q in range(QUERIES))
    assert len(d - other) == QUERIES


def test_damaged_files_are_refused(tmp_path):
    case, path = make("mlp", "fold"), tmp_path / "d.safetensors"
    dropinf.direction(case.query, case.fisher, case.compressor).save(path)
    good = path.read_bytes()
    tensors = load_file(path)
    for data in (good[:-9], b"", good.replace(b"dropinf-direction-1", b"dropinf-direction-9")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="save it again"):
            dropinf.Direction.load(path)
    assert good.count(b"linear") >= 2
    for old, new in ((b"linear", b"lineaR"), (b"/values", b"/valueS")):
        path.write_bytes(good.replace(old, new))
        with pytest.raises(ValueError, match="save it again"):
            dropinf.Direction.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="not a whole file"):
        dropinf.Direction.load(path)
    with pytest.raises(FileNotFoundError):
        dropinf.Direction.load(tmp_path / "none")


def test_what_does_not_belong_together_is_refused():
    case = make("mlp", "dropout")
    make_direction, query, fisher = dropinf.direction, case.query, case.fisher
    other = dropinf.Compressor(case.model, dropinf.Dropout(dim=(3, 2), seed=1), case.loss_fn)
    with pytest.raises(ValueError, match="query and compressor differ"):
        make_direction(query, fisher, other)
    with pytest.raises(ValueError, match="fisher and query differ"):
        make_direction(query, dropinf.build_fisher(other.compress([case.batch])), case.compressor)
    with torch.no_grad():
        case.model[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="query and compressor are of different models: the weights"):
        make_direction(query, fisher, case.compressor)
    again = case.compressor.compress([case.batch])
    with pytest.raises(ValueError, match="fisher are of different models"):
        make_direction(again, fisher, case.compressor)
    here = make_direction(again, None, case.compressor)
    with torch.no_grad():
        case.model[0].weight[0, 0] -= 1
    with pytest.raises(ValueError, match="of different models"):
        here + make_direction(query, fisher, case.compressor)


def test_rows_that_are_updates_are_refused():
    case = make("mlp", "dropout")
    adam = torch.optim.Adam(case.model.parameters())
    compressor = dropinf.Compressor(case.model, SKETCHES["dropout"], case.loss_fn, preconditioner=adam)
    with pytest.raises(ValueError, match="preconditioner"):
        dropinf.direction(case.query, case.fisher, compressor)


def test_bad_input_is_named():
    case = make("mlp", "dropout")
    model, whole = case.model, torch.zeros(2, 6, 7)
    d = dropinf.direction(case.query, case.fisher, case.compressor)
    with pytest.raises(TypeError, match="query must be Gradients"):
        dropinf.direction(case.query.flat, case.fisher, case.compressor)
    with pytest.raises(TypeError, match="fisher must be"):
        dropinf.direction(case.query, "block", case.compressor)
    with pytest.raises(TypeError, match="compressor must be"):
        dropinf.direction(case.query, case.fisher, model)
    with pytest.raises(ValueError, match="fisher has no samples"):
        dropinf.direction(case.query, dropinf.Fisher(), case.compressor)
    with pytest.raises(KeyError, match=r"no parameter 'nope'.*0.weight"):
        d.tensor("nope", 0)
    with pytest.raises(IndexError, match="out of range"):
        d.tensor("0.weight", 2)
    with pytest.raises(ValueError, match="of 2 and 1 queries"):
        d - d[0]
    with pytest.raises(ValueError, match=r"differ on parameter '0.weight'"):
        d + dropinf.Direction.dense({n: torch.zeros(2, *s) for n, s in d.shapes.items()}, model)
    with pytest.raises(TypeError):
        d * "2"
    for tensors, error, match in (
        ({}, ValueError, "empty"),
        ([whole], TypeError, "must map"),
        ({"nope": whole}, ValueError, "'nope' is not one of the model's"),
        ({"0.weight": whole.mT}, ValueError, r"is \[7, 6\] in it and \[6, 7\]"),
        ({"0.weight": whole, "0.bias": torch.zeros(3, 6)}, ValueError, r"the first has \[2\] queries"),
        ({"0.weight": whole.long()}, ValueError, "floating-point"),
        ({"0.weight": whole / 0}, ValueError, "finite"),
    ):
        with pytest.raises(error, match=match):
            dropinf.Direction.dense(tensors, model)
    with pytest.raises(TypeError, match="model must be"):
        dropinf.Direction.dense({"0.weight": whole}, None)


def test_it_holds_no_whole_parameters():
    model = nn.Linear(600, 600).double()
    compressor = dropinf.Compressor(model, dropinf.Dropout(4), lambda m, b: m(b).square().sum(1))
    gradients = compressor.compress([torch.randn(N, 600, dtype=torch.float64)])
    d = dropinf.direction(gradients, None, compressor)
    assert sum(part.values.numel() for part in d._parts.values()) == N * (4 * 4 + 4)
