"""`dropinf index`: what it keeps is what the Python API gives."""

from __future__ import annotations

import json
import re

import pytest
import torch

import dropinf
from dropinf.index import verify
from dropinf.text.passages import Passage, read_passages
from dropinf.transformer import TextModel
from tests.cli.commands import (
    QUERIES,
    close,
    error_of,
    fisher_of,
    make_passages,
    query_json,
    run,
    shuffled,
    write_jsonl,
)


def test_index_keeps_what_the_api_gives(made, common, data):
    folder, done, _, model, rows = made
    index = dropinf.Index.open(folder)
    assert torch.equal(index[:].flat, rows.flat)
    assert dict(index.digest) == dict(rows.digest)
    batches = model.workload(make_passages(50), tokens_per_batch=32).batches
    assert index.ids() == [p.id for p in make_passages(50)] != [i for batch in batches for i in batch["ids"]]
    kept = read_passages(folder / "passages.jsonl", id_field="id")
    assert [(p.id, p.text) for p in kept] == [(p.id, p.text) for p in make_passages(50)]
    close(index.fisher().solve(rows).flat, fisher_of(rows).solve(rows).flat)
    about = index.info()["about"]
    assert (about["model"], about["task"], about["max_tokens"], about["loss"]) == (common[1], "causal-lm", "32", "mean")
    assert done.stdout == ""
    assert re.search(r"compressed 50 samples in [\d.]+ s, [\d.,e+]+ a second", done.stderr)
    assert f"{folder}: 50 samples, " in done.stderr
    assert done.stderr.splitlines()[-1] == f'next: dropinf query {folder} --text "..."'
    assert verify(folder) == []


def test_verify_says_what_is_wrong(common, tmp_path):
    folder = tmp_path / "idx"
    run("index", *common, "--out", folder, "--limit", 9)
    assert run("verify", folder).stdout == "sound\n"
    (folder / "passages.jsonl").write_text("{}\n")
    asked = ["query", folder, "--text", QUERIES[0]]
    assert f"passages.jsonl: damaged, its bytes do not match their checksum; see dropinf verify {folder}" in error_of(
        *asked
    )
    shard = sorted((folder / "shards").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert f"{shard}: damaged" in error_of(*asked)
    done = run("verify", folder, code=1)
    assert len(done.stdout.splitlines()) == 2
    assert f"{shard}: damaged" in done.stdout
    assert f"{folder / 'passages.jsonl'}: damaged" in done.stdout


def test_calibration_is_on_random_passages(common, made, tmp_path):
    model, passages = made[3], make_passages(50)
    for seed in (0, 5):
        folder = tmp_path / f"energy{seed}"
        done = run("index", *common, "--sampling", "energy", "--calibration", 7, "--seed", seed, "--out", folder)
        assert "calibrating on 7 samples in random order" in done.stderr
        part = model.workload(shuffled(passages, 7, seed), tokens_per_batch=32, packed=True)
        sketch = dropinf.Dropout(3, sampling="energy", seed=seed)
        expected = dropinf.Compressor(part.model, sketch, part.loss_fn, cu_seqlens=part.cu_seqlens)
        expected.calibrate(part.batches)
        assert dict(dropinf.Index.open(folder).digest) == expected.digest()


def test_a_budget(common, made, tmp_path):
    folder = tmp_path / "idx"
    options = [x for x in common if x not in ("--dim", 3)]
    done = run(
        "index",
        *options,
        "--budget-bytes",
        600,
        "--calibration",
        9,
        "--layers",
        "*.mlp.*",
        "--layers",
        "*ln_f*",
        "--out",
        folder,
    )
    part = made[3].workload(shuffled(make_passages(50), 9, 0), tokens_per_batch=32, packed=True)
    options = {"layers": ["*.mlp.*", "*ln_f*"], "cu_seqlens": part.cu_seqlens}
    choice = dropinf.choose(part.model, part.batches, part.loss_fn, budget_bytes=600, **options)
    expected = dropinf.Compressor(part.model, choice.sketch, part.loss_fn, **options)
    expected.calibrate(part.batches)
    index = dropinf.Index.open(folder)
    assert dict(index.digest) == expected.digest()
    assert index.bytes_per_sample == choice.bytes_per_sample <= 600
    assert str(choice).splitlines()[-1] in done.stderr.splitlines()
    assert len(query_json(folder, "--text", QUERIES[1])["queries"][0]["proponents"]) == 10


def test_warnings_are_lines(common, tmp_path):
    err = run("index", *common, "--max-tokens", 5, "--out", tmp_path / "idx").stderr
    cut = sum(len(p.text.split()) > 5 for p in make_passages(50))
    assert f"dropinf: {cut} of 50 passages are longer than 5 tokens and were cut" in err.splitlines()
    assert "Warning" not in err


def test_folders_of_others_are_left_alone(common, tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "no index and not empty (it has 'thesis.tex')" in error_of("index", *common, "--out", tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    write_jsonl(own / "passages.jsonl", make_passages(3, 8))
    kept = (own / "passages.jsonl").read_bytes()
    assert "it is there already, with other passages" in error_of("index", *common, "--out", own)
    assert (own / "passages.jsonl").read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir() if p.name != "own"] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "tolerance"), [(["--packed"], 1e-4), (["--dtype", "bfloat16"], 0.05), (["--dtype", "int8"], 0.1)]
)
def test_packed_rows_and_narrow_numbers_score_alike(common, made, options, tolerance, tmp_path):
    folder = tmp_path / "idx"
    run("index", *common, *options, "--out", folder)
    ask = ["--text", QUERIES[1], "--kind", "dot", "--top", 50, "--no-opponents"]
    found, expected = (
        {s["id"]: s["score"] for s in query_json(path, *ask)["queries"][0]["proponents"]} for path in (folder, made[0])
    )
    assert found.keys() == expected.keys()
    largest = max(map(abs, expected.values()))
    assert max(abs(found[i] - expected[i]) for i in expected) < tolerance * largest
    batches = [dropinf.Index.open(path).manifest.runs[0].batches for path in (folder, made[0])]
    assert (batches[0] == batches[1]) == ("--packed" not in options)
    if "--dtype" in options:
        assert json.loads(run("info", folder, "--json").stdout)["dtype"] == options[1]


def test_classifiers(folders, data, tmp_path):
    folder, model = tmp_path / "idx", folders("bert", pad=True)
    options = ["--model", model, "--data", data, "--dim", 3, "--tokens-per-batch", 40, "--out", folder]
    assert "passage 0: label is None" in error_of("index", *options)
    assert "name their field with --label-field" in error_of("index", *options)
    run("index", *options, "--label-field", "label")
    loaded = TextModel(model)
    passages = [Passage(str(i), p.text, p.label) for i, p in enumerate(make_passages(50))]
    work = loaded.workload(passages, tokens_per_batch=40)
    compressor = dropinf.Compressor(work.model, dropinf.Dropout(3), work.loss_fn)
    rows = compressor.compress(work.batches, order=work.batches.order)
    assert sorted(dropinf.Index.open(folder).ids(), key=int) == [p.id for p in passages]
    found = query_json(folder, "--text", "the cat", "--label", 2, "--kind", "cosine", "--top", 50)["queries"][0]
    query = compressor.compress(loaded.workload([Passage("", "the cat", 2)]).batches)
    expected = dropinf.score(query, rows, kind="cosine")[0]
    for sample in found["proponents"]:
        assert sample["score"] == pytest.approx(float(expected[sample["position"]]), abs=1e-4)
    assert "label is None" in error_of("query", folder, "--text", "the cat")
    run("query", folder, "--text", "the cat", "--label", 2, "--label", 1, code=2)
