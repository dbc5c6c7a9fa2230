"""dattri-llm with our config beside its own: the same scores without compression, dropinf's gradients with it, times, memory."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dattri_llm import (
    REGISTER_ALL,
    AttributionArguments,
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
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import dropinf
from dropinf.interop.dattri_llm import sketched

# Its backward hook on the first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
ROOT = Path(__file__).resolve().parents[2]
LAYERS = [r"\.(attn|mlp)\."]
SKETCHES = [
    dropinf.Dropout(6),
    dropinf.Dropout((8, 4), group=4),
    dropinf.Dropout(6, keep=0.5, scale=True),
    dropinf.Dropout(4, rank=8, whiten=True),
    dropinf.Gaussian(5),
    dropinf.SJLT(6),
]


class Rows(list):
    """Samples as dattri-llm's loaders take them."""


def text(start, stop, length=32):
    """Passages of this repository's LICENSE, as bytes."""
    letters = torch.tensor(list((ROOT / "LICENSE").read_bytes())).clamp(max=127)
    return Rows({"input_ids": row, "labels": row} for row in letters.split(length)[start:stop])


def batches(rows, size=8):
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [{key: torch.stack([row[key] for row in chunk]) for key in chunk[0]} for chunk in chunks]


def losses(model, batch):
    """One mean over its positions for each passage."""
    logits = model(batch["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").mean(1)


def total(model, batch):
    return losses(model, batch).sum()


def gpt():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=128, n_positions=32, use_cache=False)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def trained():
    """(model, train, query): a GPT on bytes."""
    model, train, query = gpt(), text(0, 48), text(48, 60)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        for batch in batches(train):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
    model.zero_grad()
    return model, train, query


def close(found, wanted, rtol=1e-5):
    assert found.shape == wanted.shape
    error = float((found - wanted).norm() / wanted.norm())
    assert error < rtol
    return error


def arguments(folder, **options):
    return AttributionArguments(
        output_dir=str(folder), per_device_train_batch_size=8, per_device_eval_batch_size=8, use_cpu=True, **options
    )


def base(capture_style="factorized", **options):
    return HookManagerConfig(linear_io=LAYERS, capture_style=capture_style, **options)


def compressor_of(model, sketch, data, loss_fn=losses, layers=("*.attn.*", "*.mlp.*")):
    compressor = dropinf.Compressor(model, sketch, loss_fn, layers=layers)
    compressor.calibrate(data)
    return compressor


def captured(model, config, data, loss=total):
    """Layer -> [N, k]: what the hooks hold after each batch."""
    manager, found = HookManager(model, config=config), []
    with manager.collect(deregister_on_exit=True):
        for batch in data:
            model.zero_grad()
            loss(model, batch).backward()
            gradient = manager.get_gradient().materialize()
            found.append({name: gradient.data[name] for name in gradient.layer_names})
    model.zero_grad()
    assert all(type(rows) is torch.Tensor for part in found for rows in part.values())
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def expected(compressor, data, whole):
    """dropinf's gradients in dattri-llm's layout: the bias, masked as the weight's outputs, is the last column."""
    gradients, wanted = compressor.compress(data), {}
    for name, plan in compressor.layers.items():
        if plan.kind == "linear":
            bias = f"{name}.bias"
            columns = [gradients[name]]
            if bias in whole.shapes:
                columns.append(plan.out_axis.apply(whole[bias]).to(gradients.dtype).unsqueeze(2))
            wanted[name] = torch.cat(columns, 2).flatten(1)
    return wanted


def scores_of(model, config, attributor, options, train, query, folder):
    made = attributor(arguments(folder), task=AttributionTask(total, model))
    return made.attribute(train, query, hook_config=config, **options).agnostic_matrix()[1]


DAMPED = {"damping": 0.1, "relative_damping": True}


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


class Odd(nn.Module):
    """Layers of every kind, one of them called twice, under checkpointing where asked."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        self.embed, self.norm = nn.Embedding(128, 16), nn.LayerNorm(16)
        self.twice, self.head = nn.Linear(16, 16), nn.Linear(16, 128, bias=False)

    def inner(self, x):
        return torch.tanh(self.twice(self.norm(x)))

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x))


def odd_losses(model, batch):
    return F.cross_entropy(model(batch["input_ids"]).mean(1), batch["labels"][:, 0], reduction="none")


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


def gaussian(feature, batch_size, *, proj_dim, proj_seed=0, device="cpu", **_):
    """dattri's protocol for its normal projection; dattri itself is not installed here."""
    generator = torch.Generator().manual_seed(proj_seed)
    matrix = torch.randn(feature.shape[1], proj_dim, generator=generator) / proj_dim**0.5
    return lambda x: x @ matrix


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


class Pooled(nn.Module):
    """[N, T, 512] -> [N, 512]."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(512, 2048), nn.Linear(2048, 512)

    def forward(self, x):
        return self.down(F.gelu(self.up(x))).mean(1)


THEIRS = {
    "logra": {"style": "logra", "proj_dim": 64},
    "mask": {"style": "mask", "proj_dim": 64 * 65},
}


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


def test_other_layers_are_refused_in_one_line(trained):
    model = trained[0]
    with pytest.raises(ValueError, match=r"^config: layer embed \(Embedding\) is not linear; leave it out, or give it"):
        sketched(HookManagerConfig(linear_io=REGISTER_ALL), Odd(), dropinf.Dropout(4))
    with pytest.raises(ValueError, match=r"^config: layer lm_head is not a linear layer, called as a module, with a"):
        sketched(HookManagerConfig(linear_io=["lm_head"]), model, dropinf.Dropout(4))
    with pytest.raises(ValueError, match=r"^config: layer head is not a linear layer.*; leave it out, or use mode="):
        sketched(HookManagerConfig(linear_io=["head"]), Odd(), dropinf.Dropout(4, mode="flat"))
    with pytest.raises(ValueError, match=r"^config: it hooks no linear layer; name some in linear_io, or pass REG"):
        sketched(HookManagerConfig(param_grad=["norm"]), Odd(), dropinf.Dropout(4))
    with pytest.raises(RuntimeError, match="needs statistics of the data"):
        sketched(HookManagerConfig(linear_io=["head"]), Odd(), dropinf.PCA(4))


def test_versions_are_refused_in_one_line(monkeypatch):
    path = Path(dropinf.__file__).parent / "interop" / "dattri_llm.py"
    spec = importlib.util.spec_from_file_location("dropinf.interop.fresh", path)
    for error, found in {
        "dattri-llm is not installed; run: pip install dattri-llm==0.1.0": importlib.metadata.PackageNotFoundError,
        "dattri-llm is 0.2.0; this adapter reaches into that of 0.1.0: pip install dattri-llm==0.1.0": "0.2.0",
    }.items():

        def version(_, found=found):
            if isinstance(found, str):
                return found
            raise found

        monkeypatch.setattr("dropinf.interop.version", version)
        with pytest.raises(ImportError) as caught:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert str(caught.value) == error
