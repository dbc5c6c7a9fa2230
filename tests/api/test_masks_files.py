"""A file of masks that is not what `Compressor.save` wrote is an error that names the file and what is wrong."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from torch import nn

import dropinf
from dropinf.files import serialize


def loss_fn(model, batch):
    return model(batch).sum(1)


def make(sketch=None) -> dropinf.Compressor:
    torch.manual_seed(0)
    return dropinf.Compressor(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), sketch or dropinf.Dropout(3), loss_fn)


def at(*place, **values):
    def change(header, tables):
        found = header
        for key in place:
            found = found[key]
        found.update(values)

    return change


def without(*place):
    def change(header, tables):
        found = header
        for key in place[:-1]:
            found = found[key]
        del found[place[-1]]

    return change


def table(name, value):
    def change(header, tables):
        tables[name] = value

    return change


def put(axis, **values):
    return at("plan", "0", axis, **values)


WRONG = {
    "its plan is None": without("plan"),
    "its plan is 7": at(plan=7),
    "its plan is {}": at(plan={}),
    "its number of samples is None": without("samples"),
    "its number of samples is -1": at(samples=-1),
    "its number of samples is 'x'": at(samples="x"),
    "layer '0' is None": at("plan", **{"0": None}),
    "layer '0' is {'in'": without("plan", "0", "out"),
    "the out axis of layer '0' is 'x'": at("plan", "0", out="x"),
    "the in axis of layer '0' is {'group': 1}": without("plan", "0", "in", "size"),
    "the size of the out axis of layer '0' is '5'": put("out", size="5"),
    "the group of the out axis of layer '0' is 0": put("out", group=0),
    "the group of the in axis of layer '0' is None": put("in", group=None),
    "0/out/index does not consist of aligned runs of 7": put("out", group=7),
    "0/out/index does not consist of aligned runs of 3": put("out", group=3),
    "0/out/index goes from 0 to 5, of 5": table("0/out/index", torch.tensor([[0, 1, 5]], dtype=torch.int32)),
    "0/out/index goes from -1 to 2": table("0/out/index", torch.tensor([[-1, 0, 2]], dtype=torch.int32)),
    "0/out/index is torch.float32": table("0/out/index", torch.ones(1, 3)),
    "0/out/index is torch.int32 [3]": table("0/out/index", torch.ones(3, dtype=torch.int32)),
    "0/out/weight is [1, 2]; it must be [1, 3]": table("0/out/weight", torch.ones(1, 2)),
    "0/out/weight is torch.float32 [1, 3]; it must be finite": table("0/out/weight", torch.full((1, 3), torch.nan)),
    "0/out has no table of 3 coordinates": table("0/out/matrix", torch.ones(2, 5)),
    "0/in has no table of 6 coordinates": lambda header, tables: tables.pop("0/in/index"),
    "is of another model": None,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_malformed_file_says_what_is_wrong(wrong, tmp_path):
    path = tmp_path / "masks.safetensors"
    make().save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["dropinf"])
        tables = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change = WRONG[wrong]
    if change is None:
        header["plan"]["2"] = header["plan"].pop("1")
        wrong = "are of another model"
    else:
        change(header, tables)
    path.write_bytes(serialize(tables, header))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        make().load(path)
    assert wrong in str(caught.value)


@pytest.mark.parametrize(
    "sketch",
    [
        dropinf.Dropout(4, group=2),
        dropinf.Dropout(2, rank=3),
        dropinf.Dropout(3, keep=0.8, scale=True),
        dropinf.Gaussian(2),
        dropinf.SJLT(3),
        dropinf.Identity(),
        dropinf.PCA(2),
    ],
    ids=repr,
)
def test_masks_of_every_kind_are_read(sketch, tmp_path):
    saved, read = make(sketch), make(sketch)
    saved.calibrate([torch.randn(9, 6)])
    saved.save(tmp_path / "masks.safetensors")
    read.load(tmp_path / "masks.safetensors")
    assert read.digest() == saved.digest()


def test_headers_that_are_too_deep_or_too_long(tmp_path):
    path = tmp_path / "masks.safetensors"
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    inside = b'{"__metadata__":{"dropinf":"' + b"[" * 100_000 + b'"}}'
    for data in (
        len(deep).to_bytes(8, "little") + deep,
        len(inside).to_bytes(8, "little") + inside,
        (1 << 62).to_bytes(8, "little") + b"{}",
    ):
        path.write_bytes(data)
        for read in (make().load, dropinf.Fisher.load, dropinf.Gradients.load):
            with pytest.raises(ValueError, match=re.escape(str(path))):
                read(path)
