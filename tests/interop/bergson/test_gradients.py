"""bergson 2.5.1 stores and reads gradients that dropinf compressed: its normalizers, tokens and modules are its own."""

from __future__ import annotations

import json

import pytest
import torch
from bergson import (
    GradientProcessor,
    IndexConfig,
    load_gradients,
    load_module_gradients,
)
from bergson.collector.collector import HookCollectorBase
from bergson.gradients import AdafactorNormalizer, AdamNormalizer

import dropinf
from dropinf.interop import bergson as adapter
from tests.interop.bergson.models import (
    CFG,
    CONFIGS,
    SKETCHES,
    as_queries,
    batches_of,
    error_of,
    index,
    make_data,
    make_model,
    stored,
)


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_stored_gradients_are_the_compressors(kind, sketch, tmp_path):
    model, data = make_model(kind), make_data()
    compressor = adapter.make_compressor(model, SKETCHES[sketch], CFG)
    rows = [data[i] for i in batches_of(data)]
    compressor.calibrate(rows)
    want = compressor.compress(rows)
    got = adapter.import_index(index(tmp_path / "index", model, data, compressor))
    got.check_same_sketch(want)
    assert error_of(got.flat, want.flat) < 1e-12
    assert not any("head" in name or "embed_out" in name for name in want.shapes)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("sketch", ["dropout", "rotated outputs"])
def test_models_in_bfloat16(sketch, tokens, tmp_path):
    model, data = make_model(dtype=torch.bfloat16), make_data(6)
    compressor = adapter.make_compressor(model, SKETCHES[sketch], CFG)
    compressor.calibrate([data[:]])
    path = index(tmp_path / "index", model, data, compressor, attribute_tokens=tokens)
    got = torch.from_numpy(load_gradients(path).astype("float32"))
    if tokens:
        got = torch.stack([part.sum(0) for part in got.split([n - 1 for n in data["length"]])])
    assert error_of(got, compressor.compress([data[i] for i in batches_of(data)]).flat.float()) < 2**-6


def test_means_labels_and_advantages_are_bergsons(tmp_path):
    model, data = make_model(), make_data()
    labels = [[-100] * 4 + row[4:] for row in data["input_ids"]]
    data = data.add_column("labels", labels).add_column("advantage", [(-1.0) ** i for i in range(len(data))])
    options = {"loss_reduction": "mean", "label_smoothing": 0.1}
    compressor = adapter.make_compressor(model, dropinf.Dropout(8), IndexConfig(run_path="unused", **options))
    want = compressor.compress([data[i] for i in batches_of(data)])
    got = index(tmp_path / "index", model, data, compressor, **options)
    assert error_of(stored(got), want.flat) < 1e-12


def test_target_and_filtered_modules_are_bergsons(tmp_path):
    model, data = make_model(), make_data()
    compressor = adapter.make_compressor(
        model, dropinf.Dropout(8), IndexConfig(run_path="unused", filter_modules="*.mlp.*")
    )
    path = index(tmp_path / "index", model, data, compressor, filter_modules="*.mlp.*")
    assert list(load_module_gradients(path)) == [
        f"layers.{i}.self_attn.{p}_proj" for i in range(2) for p in ("q", "k", "v", "o")
    ]
    assert error_of(stored(path), compressor.compress([data[:]]).flat) < 1e-12


def test_only_the_sketched_input_is_kept():
    model, data = make_model(), make_data()
    compressor = adapter.make_compressor(model, dropinf.Dropout(8), CFG)
    collector = adapter.InMemoryCollector(model=model.base_model, data=data, cfg=CFG, compressor=compressor)
    with collector, torch.no_grad():
        model(torch.tensor([data[0]["input_ids"]]))
        kept = {name: model.base_model.get_submodule(name)._inputs for name in collector.plans}
    assert len(kept) == 14
    assert all(a.shape[-1] == 8 and a.untyped_storage().nbytes() == a.numel() * 8 for a in kept.values())


@pytest.mark.parametrize("normalizer", [AdamNormalizer, AdafactorNormalizer])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_normalizers_go_before_the_mask(kind, normalizer, tmp_path):
    model, data = make_model(kind), make_data(6)
    targets = HookCollectorBase.discover_targets(model.base_model)
    torch.manual_seed(1)
    moments = {name: AdamNormalizer(torch.rand(shape, dtype=torch.float64)) for name, (_, shape, _) in targets.items()}
    if normalizer is AdafactorNormalizer:
        moments = {name: adam.to_adafactor() for name, adam in moments.items()}
    whole = as_queries(index(tmp_path / "theirs", model, data, processor=GradientProcessor(moments)))
    compressor = adapter.make_compressor(model, dropinf.Dropout(8), CFG)
    path = index(tmp_path / "ours", model, data, compressor, processor=GradientProcessor(moments))
    got, digest = load_module_gradients(path), json.loads((path / adapter.LAYOUT).read_text())
    for name, plan_name, _, _ in digest:
        plan = compressor.layers[plan_name]
        rows, columns = plan.out_axis.index[0].long(), plan.in_axis.index[0].long()
        want = whole[name].view(6, *targets[name][1])[:, rows[:, None], columns]
        torch.testing.assert_close(torch.from_numpy(got[name].copy()).view_as(want), want, rtol=1e-9, atol=1e-12)


def test_an_adam_normalizer_with_another_sketch_is_one_clear_line(tmp_path):
    model, data = make_model(), make_data(3)
    targets = HookCollectorBase.discover_targets(model.base_model)
    moments = {name: AdamNormalizer(torch.ones(shape, dtype=torch.float64)) for name, (_, shape, _) in targets.items()}
    compressor = adapter.make_compressor(model, dropinf.Gaussian(8), CFG)
    with pytest.raises(ValueError, match=r"^compressor: an Adam normalizer goes with plain Dropout alone[^\n]*$"):
        index(tmp_path / "ours", model, data, compressor, processor=GradientProcessor(moments))


def test_token_gradients_add_up_to_those_of_samples(tmp_path):
    model, data = make_model(), make_data(6)
    compressor = adapter.make_compressor(model, dropinf.Dropout(8), CFG)
    tokens = index(tmp_path / "tokens", model, data, compressor, attribute_tokens=True)
    counts = torch.tensor(data["length"]) - 1
    parts = stored(tokens).split(counts.tolist())
    want = stored(index(tmp_path / "samples", model, data, compressor))
    assert error_of(torch.stack([p.sum(0) for p in parts]), want) < 1e-12
    with pytest.raises(ValueError, match=r"its rows are tokens, not samples; build it with attribute_tokens=False$"):
        adapter.import_index(tokens)
    flat = adapter.make_compressor(model, dropinf.Dropout(8, mode="flat"), CFG)
    with pytest.raises(ValueError, match=r"^compressor: attribute_tokens needs the factors"):
        index(tmp_path / "flat", model, data, flat, attribute_tokens=True)
