"""bergson 2.5.1's scores, queries and command line on gradients that dropinf compressed, and files both ways."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from bergson import Attributor as TheirAttributor
from bergson import (
    CollectorComputer,
    GradientProcessor,
    IndexConfig,
    PreprocessConfig,
    Scorer,
    load_gradient_dataset,
    load_gradients,
)
from bergson import InMemoryCollector as TheirInMemory
from bergson.build import build
from bergson.gradients import AdamNormalizer
from bergson.score.score_writer import InMemorySequenceScoreWriter, InMemoryTokenScoreWriter

import dropinf
from dropinf.interop import bergson as adapter
from tests.interop.bergson.models import (
    CFG,
    CONFIGS,
    as_queries,
    batches_of,
    error_of,
    index,
    make_data,
    make_model,
    run_pipeline,
    stored,
)


@pytest.mark.parametrize("kind", CONFIGS)
def test_uncompressed_scores_are_bergsons(kind, tmp_path, record):
    model, data, queries = make_model(kind), make_data(), make_data(4, start=2000)
    compressor = adapter.make_compressor(model, dropinf.Identity(), CFG)
    scores = {}
    for name, chosen in {"theirs": None, "ours": compressor}.items():
        train = index(tmp_path / f"train-{name}", model, data, chosen)
        query = index(tmp_path / f"query-{name}", model, queries, chosen)
        for unit_norm in (False, True):
            attributor = TheirAttributor(train, dtype=torch.float64, unit_norm=unit_norm)
            found = attributor.search(as_queries(query), None)
            scores[name, unit_norm] = found.values.gather(1, found.indices.argsort(1))
    errors = [error_of(scores["ours", u], scores["theirs", u]) for u in (False, True)]
    record(
        "bergson",
        f"small {kind} on bytes, uncompressed: scores of its Attributor, dot and cosine",
        agreement=max(errors),
    )
    assert max(errors) < 1e-5


@pytest.mark.parametrize("tokens", [False, True])
def test_scorer_reads_compressed_gradients_as_they_are_formed(tokens, tmp_path):
    model, data, queries = make_model(), make_data(), make_data(3, start=2000)
    compressor = adapter.make_compressor(model, dropinf.Dropout(8), CFG)
    query = as_queries(index(tmp_path / "query", model, queries, compressor))
    writer = (
        InMemoryTokenScoreWriter(data, 3, torch.float64)
        if tokens
        else InMemorySequenceScoreWriter(len(data), 3, torch.float64)
    )
    scorer = Scorer(query, list(query), writer, torch.device("cpu"), torch.float64, attribute_tokens=tokens)
    cfg = IndexConfig(run_path=str(tmp_path / "scores"), attribute_tokens=tokens)
    cfg.partial_run_path.mkdir()
    adapter.collect_gradients(
        model, data, GradientProcessor(), cfg, batches=batches_of(data), scorer=scorer, compressor=compressor
    )
    got = torch.stack([s.sum(0) for s in writer.scores]) if tokens else writer.scores
    train = compressor.compress([data[i] for i in batches_of(data)])
    want = dropinf.score(compressor.compress([queries[:]]), train, kind="dot").T
    assert error_of(got, want) < 1e-6  # it adds up its scores in float32


def test_trace_compresses_the_query(tmp_path):
    model, data = make_model(), make_data()
    compressor = adapter.make_compressor(model, dropinf.Dropout(8), CFG)
    path = index(tmp_path / "index", model, data, compressor)
    attributor = adapter.Attributor(path, dtype=torch.float64, compressor=compressor)
    x = torch.tensor([make_data(1, start=3000)[0]["input_ids"]])
    with attributor.trace(model.base_model, None) as result:
        logits = model(x).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits[0], x[0, 1:], reduction="sum").backward()
    train = compressor.compress([data[i] for i in batches_of(data)])
    query = compressor.compress([{"input_ids": x.tolist()}])
    want = dropinf.score(query, train, kind="dot")
    assert error_of(result.scores, want.gather(1, result.indices)) < 1e-12


def test_build_and_score_of_the_command_line(saved, tmp_path, record):
    sketch = dropinf.Dropout(8)
    got = run_pipeline(saved, tmp_path, adapter.sketched(sketch))
    assert load_gradients(tmp_path / "queries").shape[1] == 14 * 64
    compressor = adapter.make_compressor(make_model(dtype=torch.float32), sketch, CFG)
    train, query = make_data(), make_data(3, start=2000)
    want = dropinf.score(compressor.compress([query[:]]), compressor.compress([train[:]]), kind="dot").T
    record(
        "bergson",
        "small llama on bytes, mask 8x8: build and score against dropinf.score",
        agreement=error_of(got, want),
    )
    assert error_of(got, want) < 1e-5


def test_build_in_two_processes(saved, tmp_path):
    with adapter.sketched(dropinf.Dropout(8)):
        build(saved("two", "train", processes=2), PreprocessConfig())
    with adapter.sketched(dropinf.Dropout(8)):
        build(saved("one", "train"), PreprocessConfig())
    one, two = adapter.import_index(tmp_path / "one"), adapter.import_index(tmp_path / "two")
    one.check_same_sketch(two)
    assert error_of(two.flat, one.flat) < 1e-5


def test_build_outside_of_sketched_is_bergsons_own(saved, tmp_path):
    with pytest.raises(RuntimeError, match="stop"), adapter.sketched(dropinf.Dropout(8)):
        raise RuntimeError("stop")
    build(saved("queries", "query"), PreprocessConfig())
    assert load_gradients(tmp_path / "queries").shape[1] > 14 * 64


def test_calibrated_masks_travel_as_a_file(saved, tmp_path):
    sketch = dropinf.Dropout(8, rank=24)
    compressor = adapter.make_compressor(make_model(dtype=torch.float32), sketch, CFG)
    data = make_data()
    compressor.calibrate([data[:]])
    compressor.save(tmp_path / "masks.safetensors")
    with adapter.sketched(sketch, masks=str(tmp_path / "masks.safetensors")):
        build(saved("index", "train"), PreprocessConfig())
    got = adapter.import_index(tmp_path / "index")
    want = compressor.compress([data[:]])
    got.check_same_sketch(want)
    assert error_of(got.flat, want.flat) < 1e-5
    with pytest.raises(RuntimeError, match=r"compressor\.load"), adapter.sketched(sketch):
        build(saved("other", "train"), PreprocessConfig())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exported_gradients_are_read_and_scored_by_bergson(dtype, tmp_path):
    model, data = make_model(), make_data()
    compressor = adapter.make_compressor(model, dropinf.Dropout(8), CFG)
    train = compressor.compress([data[i] for i in batches_of(data)]).to(dtype)
    adapter.export_index(train, tmp_path / "index", data=data, prefix="model.")
    back = adapter.import_index(tmp_path / "index")
    back.check_same_sketch(train)
    assert back.dtype == dtype
    assert torch.equal(back.flat, train.flat)
    query = train[:3].to(torch.float64)
    queries = {name.removeprefix("model."): c.flatten(1) for name, c in query.layers.items()}
    found = TheirAttributor(tmp_path / "index", dtype=torch.float64).search(queries, 5)
    want = dropinf.score(query, train.to(torch.float64), kind="dot", top=5)
    assert error_of(found.values, want.values) < 1e-12
    assert torch.equal(found.indices, want.indices)
    rows = torch.tensor(load_gradient_dataset(tmp_path / "index")["gradients"][:], dtype=torch.float64)
    assert torch.equal(rows.to(dtype), train.flat)


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_an_index_on_disk_is_exported_block_by_block(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("dropinf.gradients.BLOCK_ROWS", 7)
    model, data = make_model(dtype=torch.float32), make_data()
    compressor = adapter.make_compressor(model, dropinf.Dropout(8), CFG)
    source = compressor.compress([data[i] for i in batches_of(data)], out=tmp_path / "ours", dtype=dtype)
    adapter.export_index(source, tmp_path / "theirs")
    want = torch.cat([part.flat for _, part in source.blocks(7)])
    assert torch.equal(stored(tmp_path / "theirs"), want)


@pytest.mark.parametrize("dim", [0, 8])
def test_bergsons_own_index_is_imported(dim, tmp_path):
    model, data = make_model(), make_data()
    path = index(tmp_path / "index", model, data, projection_dim=dim)
    train = adapter.import_index(path)
    found = TheirAttributor(path, dtype=torch.float64).search(
        {n: c.flatten(1) for n, c in train[:2].layers.items()}, None
    )
    got = dropinf.score(train[:2], train, kind="dot")
    assert error_of(found.values, got.gather(1, found.indices)) < 1e-12
    if dim:
        assert set(train.shapes.values()) == {(8, 8)}
        assert dropinf.self_influence(train, dropinf.build_fisher(train, "kronecker")).min() > 0
        other = adapter.import_index(
            index(tmp_path / "other", model, data, processor=GradientProcessor(projection_dim=8, projection_seed=1))
        )
        with pytest.raises(ValueError, match="different masks"):
            dropinf.score(other, train, kind="dot")


def test_wrong_version_and_missing_package_are_one_line(monkeypatch):
    monkeypatch.setattr("dropinf.interop.version", lambda name: "2.4.0")
    with pytest.raises(
        ImportError,
        match=r"^bergson is 2\.4\.0; this adapter reaches into that of 2\.5\.1: pip install bergson==2\.5\.1$",
    ):
        importlib.reload(adapter)

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("dropinf.interop.version", missing)
    with pytest.raises(ImportError, match=r"^bergson is not installed; run: pip install bergson==2\.5\.1$"):
        importlib.reload(adapter)


def test_what_does_not_go_together_is_one_line(tmp_path):
    model, data = make_model(), make_data(3)
    compressor = adapter.make_compressor(model, dropinf.Dropout(8), CFG)
    with pytest.raises(ValueError, match=r"^compressor takes whole weights: no projection_dim[^\n]*$"):
        index(tmp_path / "a", model, data, compressor, projection_dim=8)
    other = adapter.make_compressor(model, dropinf.Dropout(8), IndexConfig(run_path="x", filter_modules="*.q_proj"))
    with pytest.raises(ValueError, match=r"^compressor: module layers\.0\.self_attn\.q_proj \(Linear\) is not[^\n]*$"):
        index(tmp_path / "b", model, data, other)
    model.model.odd = torch.nn.Conv1d(4, 4, 1).double()
    compressor = adapter.make_compressor(model, dropinf.Dropout(8), CFG)
    with pytest.raises(ValueError, match=r"^compressor: module odd \(Conv1d\) is not a linear layer[^\n]*$"):
        index(tmp_path / "c", model, data, compressor)
    with pytest.raises(FileNotFoundError):
        adapter.import_index(tmp_path / "nothing")
    kl = adapter.make_compressor(make_model(), dropinf.Dropout(8), IndexConfig(run_path="x", loss_fn="kl"))
    with pytest.raises(ValueError, match=r"^cfg\.loss_fn is 'kl'"):
        kl.compress([data[:]])


@pytest.mark.parametrize("dim", [16, 64])
def test_speed_and_memory_beside_its_projections(dim, compare, tmp_path):
    """Its collection of one batch, and its hooks alone, on a Llama layer of realistic width."""
    model = make_model(
        dtype=torch.float32, hidden_size=1024, intermediate_size=2816, num_hidden_layers=1, num_attention_heads=8
    )
    data = make_data(8, least=128, most=128)
    compressor = adapter.make_compressor(model, dropinf.Dropout(dim), CFG)
    cfg = IndexConfig(run_path=str(tmp_path / "run"))
    cfg.partial_run_path.mkdir()
    processors = GradientProcessor(), GradientProcessor(projection_dim=dim)
    ours = adapter.InMemoryCollector(
        model=model.base_model, data=data, cfg=cfg, processor=processors[0], compressor=compressor
    )
    theirs = TheirInMemory(model=model.base_model, data=data, cfg=cfg, processor=processors[1])

    def collect(collector):
        return lambda: CollectorComputer(
            model, data, collector=collector, batches=[list(range(8))], cfg=cfg
        ).run_with_collector_hooks()

    module = model.base_model.layers[0].mlp.up_proj
    a, g = torch.randn(8, 128, 1024), torch.randn(8, 128, 2816)

    def hooks(collector):
        def job():
            module._name, module._collect_bias = "layers.0.mlp.up_proj", False
            collector.forward_hook(module, a)
            collector._compute_gradient(module, g)
            del module._inputs, module._name

        return job

    what = f"mask {dim}x{dim}, 8 x 128 positions, against its Rademacher projection:"
    runs = {"a Llama layer of 1024 and 2816": collect, "the hooks of 1024 -> 2816": hooks}
    for name, job in {**runs, "the same hooks with an Adam normalizer": hooks}.items():
        if "Adam" in name:
            for processor in processors:
                processor.normalizers = {"layers.0.mlp.up_proj": AdamNormalizer(torch.rand(2816, 1024))}
        compare("bergson", f"{what} {name}", job(ours), job(theirs), rounds=11)
    want = compressor.compress([data[:]])
    assert error_of(torch.cat([ours.gradients[n] for n in ours.plans], 1), want.flat) < 1e-4
