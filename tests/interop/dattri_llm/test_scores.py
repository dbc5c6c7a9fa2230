"""dattri-llm with our config beside its own: the same scores without compression, dropinf's gradients with it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dattri_llm import (
    REGISTER_ALL,
    AttributionTask,
    EKFACAttributor,
    GradientStorageManager,
    HookManager,
    HookManagerConfig,
    KFACAttributor,
    OffloadCallback,
    TracInAttributor,
)
from dattri_llm.gradient import ops
from sklearn.datasets import load_digits
from torch import nn

import dropinf
from dropinf.interop.dattri_llm import sketched
from tests.interop.dattri_llm.models import (
    DAMPED,
    SKETCHES,
    Odd,
    Rows,
    arguments,
    base,
    batches,
    captured,
    close,
    compressor_of,
    expected,
    gaussian,
    losses,
    odd_losses,
    scores_of,
    text,
)

# Its backward hook on the first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.mark.parametrize(
    ("attributor", "options", "style"),
    [
        *((TracInAttributor, {}, style) for style in ("factorized", "materialized", "auto")),
        *((TracInAttributor, {"normalized_grad": True}, style) for style in ("factorized", "materialized")),
        (KFACAttributor, DAMPED, "factorized"),
        (KFACAttributor, DAMPED | {"gradient_cache_residency": "memory"}, "materialized"),
        (EKFACAttributor, DAMPED, "factorized"),
    ],
)
def test_whole_gradients_give_its_scores(trained, attributor, options, style, tmp_path, record):
    model, train, query = trained
    model = copy.deepcopy(model).double()  # for eigenbases
    arguments = attributor, options, train, query
    config = base()
    if attributor is KFACAttributor and style == "materialized":  # 1e-5 from the factors' scores in dattri-llm as well
        whole = {"__default__": {"style": "logra", "proj_dim": 1}}
        config = base(style, projector=lambda *_, **__: lambda x: x, projection_kwargs=whole)
    theirs = scores_of(model, config, *arguments, tmp_path / "theirs")
    ours = scores_of(model, sketched(base(style), model, dropinf.Identity()), *arguments, tmp_path / "ours")
    error = close(ours, theirs)
    name = "GradCos" if "normalized_grad" in options else attributor.__name__
    record("dattri-llm", f"{name}, {style}, GPT-2 of 2 layers on bytes, Identity, float64", agreement=error)


@pytest.mark.parametrize("attributor", [TracInAttributor, KFACAttributor, EKFACAttributor])
def test_masks_rank_like_whole_gradients(trained, attributor, tmp_path, record):
    model, train, query = trained
    arguments = attributor, {} if attributor is TracInAttributor else DAMPED, train, query
    whole = scores_of(model, base(), *arguments, tmp_path / "whole")
    config = sketched(base("factorized"), model, dropinf.Dropout(16))
    found = scores_of(model, config, *arguments, tmp_path / "mask")
    correlation = float(torch.corrcoef(torch.stack([whole.flatten(), found.flatten()]))[0, 1])
    assert correlation > 0.7
    what = f"{attributor.__name__}, GPT-2 of 2 layers on bytes, mask 16x16 against whole gradients, Pearson"
    record("dattri-llm", what, agreement=correlation)


@pytest.mark.parametrize("style", ["factorized", "materialized", "auto"])
@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
def test_rows_are_dropinfs(trained, sketch, style):
    model, train, _ = trained
    data = batches(train)
    compressor = compressor_of(model, sketch, data)
    chosen = compressor if compressor._moments.needed else sketch
    found = captured(model, sketched(base(style), model, chosen), data)
    whole = compressor_of(model, dropinf.Identity(), data).compress(data)
    wanted = expected(compressor, data, whole)
    assert found.keys() == wanted.keys()
    assert len(found) == 8
    for name, rows in wanted.items():
        close(found[name], rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "autocast"])
def test_lower_precision(trained, dtype):
    model, train, _ = trained
    data = batches(train)
    model = copy.deepcopy(model).bfloat16() if dtype == "bfloat16" else model

    def each(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            return losses(model, batch).float()

    compressor = compressor_of(model, dropinf.Dropout(6), data, each)
    config = sketched(base("materialized"), model, dropinf.Dropout(6))
    found = captured(model, config, data, lambda model, batch: each(model, batch).sum())
    wanted = compressor.compress(data)
    for name, rows in found.items():
        close(rows.float().unflatten(1, (6, 7))[:, :, :6], wanted[name].float(), 3e-2)


def test_attribution_from_disk_and_live_are_dropinfs_dot_products(tmp_path):
    """Its README's two routes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24, bias=False), nn.ReLU(), nn.Linear(24, 10, bias=False))
    x, y = load_digits(return_X_y=True)
    rows = Rows({"x": a, "y": b} for a, b in zip(torch.tensor(x[:60]).float() / 16, torch.tensor(y[:60]), strict=True))
    train, query = Rows(rows[:48]), Rows(rows[48:])

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x, y):
            return F.cross_entropy(self.body(x), y, reduction="none")

    named = Named()
    config = sketched(HookManagerConfig(linear_io=REGISTER_ALL), named, dropinf.Dropout(6))
    task = AttributionTask(lambda model, batch: model(**batch).sum(), named)
    live = TracInAttributor(arguments(tmp_path / "live"), task=task).attribute(train, query, hook_config=config)
    stores = []
    for name, data in {"train": train, "query": query}.items():
        stores.append(str(tmp_path / name))
        offload = OffloadCallback(
            offload_interval=1, file_manager=GradientStorageManager(stores[-1]), recording_type="per_sample"
        )
        manager = HookManager(named, config=config, callbacks=[offload])
        with manager.collect(deregister_on_exit=True):
            for batch in batches(data):
                named(**batch).sum().backward()
    stored = TracInAttributor(arguments(tmp_path / "stored")).attribute_from_cache(*stores)
    compressor = dropinf.Compressor(named, dropinf.Dropout(6), lambda model, batch: model(**batch))
    wanted = dropinf.score(compressor.compress(batches(query)), compressor.compress(batches(train)), kind="dot").T
    for score in (live, stored):
        close(score.agnostic_matrix()[1], wanted)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_other_layers_keep_their_own_projection(checkpointed):
    torch.manual_seed(0)
    model, data = Odd(checkpointed).eval(), batches(text(0, 16))
    own = {
        "embed": {"style": "mask", "proj_dim": 32},
        "norm": {"style": "mask", "proj_dim": 8},
        "__default__": {"style": "logra", "proj_dim": 4},
        "twice": {"style": "logra", "proj_dim": 3},
    }
    config = HookManagerConfig(linear_io=REGISTER_ALL, capture_style="materialized", projection_kwargs=own)
    loss = lambda model, batch: odd_losses(model, batch).sum()  # noqa: E731
    found = captured(model, sketched(config, model, dropinf.Dropout(6)), data, loss)
    theirs = captured(
        model,
        HookManagerConfig(linear_io=[r"embed", r"norm"], projection_kwargs={n: own[n] for n in ("embed", "norm")}),
        data,
        loss,
    )
    for name, rows in theirs.items():
        assert torch.equal(found[name], rows)
    wanted = dropinf.Compressor(model, dropinf.Dropout(6), odd_losses, layers=["head", "twice.weight"]).compress(data)
    close(found["head"], wanted["head"].flatten(1))
    close(found["twice"].unflatten(1, (6, 7))[:, :, :6], wanted["twice"])
    assert config.projection_kwargs["twice"]["proj_dim"] == 3  # the config given is left as it is


def test_entries_of_their_own_use_the_configs_projector():
    torch.manual_seed(0)
    model, data = Odd().eval(), batches(text(0, 16))
    own = {"norm": {"style": "dense", "proj_dim": 8}, "embed": {"style": "mask", "proj_dim": 8}}
    config = HookManagerConfig(linear_io=REGISTER_ALL, projection_kwargs=own, projector=gaussian)
    loss = lambda model, batch: odd_losses(model, batch).sum()  # noqa: E731
    found = captured(model, sketched(config, model, dropinf.Dropout(6)), data, loss)
    only = HookManagerConfig(linear_io=[r"norm"], projection_kwargs=own, projector=gaussian)
    assert torch.equal(found["norm"], captured(model, only, data, loss)["norm"])


def test_a_matrix_is_used_as_a_matrix_too():
    """What dattri-llm keeps may be multiplied in other ways than it does now."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12))
    config = sketched(HookManagerConfig(linear_io=REGISTER_ALL), model, dropinf.Dropout(5))
    projector = ops.DattriProjector(config.projector)
    for seed, size, rows in ((0, 12, 12), (1, 20, 21)):
        matrix = projector.matrix(
            rows, proj_dim=1, proj_seed=seed, device=torch.device("cpu"), dtype=torch.float32, layer="0"
        )
        plain = torch.tensor(matrix.tolist())
        x, row, turned = torch.randn(7, size), torch.randn(matrix.shape[1]), torch.arange(size).flip(0)
        whole = lambda m, size=size: m if len(m) == size else m[:-1]  # noqa: E731
        assert matrix.shape == (rows, 5 + seed)
        for found, wanted in {
            "product": (x @ matrix[:size], x @ plain[:size]),
            "transposed": (matrix.T @ torch.ones(rows), plain.T @ torch.ones(rows)),
            "batched": (x[None] @ matrix[:size], x[None] @ plain[:size]),
            "scaled": (torch.addmm(row, x, matrix[:size], beta=2), torch.addmm(row, x, plain[:size], beta=2)),
            "row": (matrix[-1] * 2, plain[-1] * 2),
            "columns": (x @ matrix[:size, 2:], x @ plain[:size, 2:]),
            "rows": (x[:, 1:] @ matrix[1:size], x[:, 1:] @ plain[1:size]),
            "shuffled": (x @ matrix[turned], x @ plain[turned]),
            "beside": (x @ whole(torch.cat([matrix, matrix], 1)), x @ torch.cat([plain, plain], 1)[:size]),
            "double": (x.double() @ matrix.to(torch.float64)[:size], x.double() @ plain.double()[:size]),
        }.values():
            assert type(found) is torch.Tensor
            assert torch.equal(found, wanted)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            x @ torch.cat([matrix, matrix], dim=0)


def test_a_product_has_the_dtype_of_its_factors():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 12)), torch.randn(30, 20)
    compressor = compressor_of(
        model, dropinf.Dropout(4, rank=8), [x], lambda model, x: model(x).square().sum(1), ["0.weight"]
    )
    config = sketched(HookManagerConfig(linear_io=REGISTER_ALL), model, compressor)
    made = ops.DattriProjector(config.projector).resolve(
        20, proj_dim=1, proj_seed=1, include_bias=True, device="cpu", dtype=torch.bfloat16, layer="0"
    )
    assert made(x.bfloat16()).dtype == torch.bfloat16
