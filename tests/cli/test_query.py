"""`dropinf query` and what else asks an index: what they print is what the Python API gives."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch

import dropinf
from dropinf.text.passages import Passage
from tests.cli.commands import (
    QUERIES,
    error_of,
    fisher_of,
    make_passages,
    query_json,
    query_rows,
    run,
    write_jsonl,
)


@pytest.mark.parametrize("kind", ["influence", "dot", "cosine", "relative"])
def test_query_is_score(made, kind):
    folder, _, _, _, rows = made
    arguments = [x for text in QUERIES for x in ("--text", text)]
    found = query_json(folder, *arguments, "--kind", kind, "--top", 4)
    fisher = fisher_of(rows)
    assert found.keys() == {"index", "samples", "kind", "fisher", "queries"}
    reads = kind in ("influence", "relative")
    facts = (str(folder), 50, kind, "block, damping auto" if reads else "not used")
    assert (found["index"], found["samples"], found["kind"], found["fisher"]) == facts
    expected = dropinf.score(query_rows(made), rows, fisher if reads else None, kind=kind)
    names, texts = dropinf.Index.open(folder).ids(), {p.id: p.text for p in make_passages(50)}
    assert [(q["id"], q["text"], q["image"]) for q in found["queries"]] == [
        (str(i), t, None) for i, t in enumerate(QUERIES)
    ]
    for query, scores in zip(found["queries"], expected, strict=True):
        assert query.keys() == {"id", "text", "image", "proponents", "opponents"}
        for side, sign in (("proponents", -1), ("opponents", 1)):
            best = (sign * scores).sort(stable=True).indices[:4].tolist()
            assert [s["position"] for s in query[side]] == best
            for sample, i in zip(query[side], best, strict=True):
                assert sample.keys() == {"position", "id", "score", "text", "image"}
                assert (sample["id"], sample["text"], sample["image"]) == (names[i], texts[names[i]], None)
                assert sample["score"] == pytest.approx(
                    float(scores[i]), rel=1e-4, abs=1e-6 * float(scores.abs().max())
                )


def test_queries_of_a_file_stay_in_order(made, tmp_path):
    folder, _, _, _, rows = made
    path = write_jsonl(tmp_path / "queries.jsonl", [Passage(n, t) for n, t in zip("xyz", QUERIES, strict=True)])
    found = query_json(folder, "--data", path, "--id-field", "id", "--no-opponents", "--damping", "0.5")
    assert [(q["id"], q["text"]) for q in found["queries"]] == list(zip("xyz", QUERIES, strict=True))
    assert found["fisher"] == "block, damping 0.5"
    best = dropinf.score(query_rows(made), rows, fisher_of(rows).with_damping(0.5), top=10)
    for query, values, positions in zip(found["queries"], best.values, best.indices, strict=True):
        assert [s["position"] for s in query["proponents"]] == positions.tolist()
        assert [s["score"] for s in query["proponents"]] == pytest.approx(values.tolist(), rel=1e-4)
        assert query["opponents"] == []


def test_tables(made, monkeypatch):
    folder = made[0]
    arguments = ["query", folder, "--text", QUERIES[0] + "\x1b[31m red\n[bold]", "--top", 3]
    found = json.loads(run(*arguments, "--json").stdout)["queries"][0]
    shown = run(*arguments).stdout
    assert "\x1b" not in shown  # neither colours nor what a text brings
    lines = shown.splitlines()
    assert lines[0] == rf"Query 0: {QUERIES[0]}\x1b[31m red [bold]"
    rows = [
        f"{i} {s['score']:+.4g} {s['id']} {s['text']}"
        for side in ("proponents", "opponents")
        for i, s in enumerate(found[side], 1)
    ]
    assert [" ".join(line.split()) for line in lines if line[:1].isdigit()] == rows
    assert [line.strip() for line in lines if line.strip() in ("Proponents", "Opponents")] == [
        "Proponents",
        "Opponents",
    ]
    assert "Opponents" not in run(*arguments, "--no-opponents").stdout
    monkeypatch.setenv("COLUMNS", "40")
    narrow = run(*arguments).stdout.splitlines()
    assert max(map(len, narrow)) <= 40
    assert sum("…" in line for line in narrow) >= 3


def test_pages(made, tmp_path):
    pages = pytest.importorskip("dropinf.cli.page")
    result = tmp_path / "result.json"
    done = run("query", made[0], "--text", QUERIES[0], "--json", "--html", tmp_path / "a.html")
    result.write_text(done.stdout)
    run("report", result, "-o", tmp_path / "b.html")
    run("report", "-", "-o", tmp_path / "c.html", stdin=done.stdout)
    expected = pages.query_page(json.loads(done.stdout))
    assert QUERIES[0] in expected
    assert all((tmp_path / f"{name}.html").read_text() == expected for name in "abc")
    run("report", result, "-o", tmp_path / "d.html", "--title", "Brown")
    assert "<title>Brown</title>" in (tmp_path / "d.html").read_text()
    result.write_text('{"index": 3')
    assert re.match(
        r"\S+result.json: not JSON \(.*\); pass what dropinf query --json",
        error_of("report", result, "-o", tmp_path / "e.html"),
    )
    result.write_text("{}")
    assert "result has no " in error_of("report", result, "-o", tmp_path / "e.html")
    assert not (tmp_path / "e.html").exists()


def test_self_influence(made, tmp_path):
    folder, _, _, _, rows = made
    values = dropinf.self_influence(rows, fisher_of(rows))
    done = run("self-influence", folder, "--top", 5, "--json", "--out", tmp_path / "all.npy")
    found = json.loads(done.stdout)
    assert found.keys() == {"index", "samples", "fisher", "self_influence"}
    order = values.sort(descending=True, stable=True).indices[:5].tolist()
    names, texts = dropinf.Index.open(folder).ids(), {p.id: p.text for p in make_passages(50)}
    got = found["self_influence"]
    assert [(s["position"], s["id"], s["text"]) for s in got] == [(i, names[i], texts[names[i]]) for i in order]
    assert [s["score"] for s in got] == pytest.approx(values[order].tolist(), rel=1e-4)
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), values, rtol=1e-4)
    table = run("self-influence", folder, "--top", 5).stdout
    assert re.findall(r"^\d+ .*? (p\d+) ", table, re.M) == [names[i] for i in order]
    heavy = json.loads(run("self-influence", folder, "--damping", 3, "--json").stdout)["self_influence"]
    expected = dropinf.self_influence(rows, fisher_of(rows).with_damping(3.0)).max()
    assert heavy[0]["score"] == pytest.approx(float(expected), rel=1e-4)
    run("self-influence", folder, "--out", tmp_path / "all.txt", code=2)


def test_fisher_and_export(common, made, tmp_path):
    rows, folder = made[4], tmp_path / "idx"
    run("index", *common, "--out", folder, "--fisher", "none")
    asked = ["query", folder, "--text", QUERIES[0]]
    assert error_of(*asked) == (
        f"{folder}: no Fisher matrix in it; build one with: dropinf fisher {folder}, or ask for --kind dot or cosine"
    )
    assert "build one with" in error_of("export", folder, tmp_path / "rows.npy")
    run(*asked, "--kind", "cosine")
    assert run("fisher", folder, "--kind", "kronecker", "--damping", "0.2").stdout == ""
    fisher = dropinf.build_fisher(rows, "kronecker", 0.2)
    index = dropinf.Index.open(folder)
    assert (index.fisher().kind, index.fisher().damping) == ("kronecker", 0.2)
    first = query_json(folder, "--text", QUERIES[0])["queries"][0]["proponents"][0]
    assert first["score"] == pytest.approx(float(dropinf.score(query_rows(made)[:1], rows, fisher).max()), rel=1e-3)
    for suffix in ("npy", "safetensors"):
        run("export", folder, tmp_path / f"rows.{suffix}")
    torch.testing.assert_close(
        torch.from_numpy(np.load(tmp_path / "rows.npy")), fisher.whiten(rows).flat, rtol=1e-3, atol=1e-3
    )
    faiss = pytest.importorskip("faiss")
    run("export", folder, tmp_path / "rows.faiss")
    assert faiss.read_index(str(tmp_path / "rows.faiss")).ntotal == 50
    done = run("export", folder, tmp_path / "rows.faiss", "--factory", "IVF2,Flat", "--memory-bytes", 1 << 27)
    assert f"50 rows, and their ids to {tmp_path / 'rows.faiss.ids'}" in done.stderr
    assert faiss.read_index(str(tmp_path / "rows.faiss")).nlist == 2
    assert [json.loads(x) for x in (tmp_path / "rows.faiss.ids").read_text().splitlines()] == index.ids()
    wanted = error_of(
        "export", folder, tmp_path / "rows.faiss", "--factory", "IVF2,Flat", "--memory-bytes", 400 * rows.flat.shape[1]
    )
    assert "open the index with --memory-bytes" in wanted
    assert "must end in .npy" in error_of("export", folder, tmp_path / "rows.txt")
    assert run("verify", folder).stdout == "sound\n"


def test_info(made):
    folder = made[0]
    found = json.loads(run("info", folder, "--json").stdout)
    assert found == dropinf.Index.open(folder).info()
    shown = run("info", folder).stdout
    numbers = sum(int(np.prod(shape)) for shape in found["layers"].values())
    assert f"50 x {numbers:,} numbers of {len(found['layers'])} layers, float32" in shown
    assert re.search(r"^max tokens +32$", shown, re.M)
    for name, value in found["about"].items():
        assert re.search(rf"^{name.replace('_', ' ')} +{re.escape(value)}$", shown, re.M), name


def test_the_model_of_a_query(made, folders, tmp_path):
    """It may have moved, but must be the same."""
    shutil.copytree(folders("gpt2"), tmp_path / "moved")
    ask = ["query", made[0], "--text", QUERIES[0], "--json"]
    assert run(*ask, "--model", tmp_path / "moved").stdout == run(*ask).stdout
    message = error_of(*ask, "--model", folders("gpt2", initializer_range=0.2))
    assert message == (
        f"model: its weights are not those that {made[0]} was made with; pass the model of then, in the same dtype"
    )


def test_a_configuration_that_was_changed_shows_in_the_first_batch(folders, tmp_path):
    """Neither query nor append; and what a refused append began is taken out."""
    shutil.copytree(folders("gpt2"), tmp_path / "model")
    data, more = (
        write_jsonl(tmp_path / name, make_passages(n)) for name, n in (("data.jsonl", 10), ("more.jsonl", 16))
    )
    options = ["--model", tmp_path / "model", "--dim", 3, "--out", tmp_path / "idx"]
    done = run("index", *options, "--data", data)
    ask = ["query", tmp_path / "idx", "--text", QUERIES[0], "--json"]
    assert "attributes" not in run(*ask).stderr + done.stderr
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_epsilon": 0.1}))
    assert "which it keeps, they now give others than the gradients it holds" in error_of(*ask)
    assert "settings of modules are others" in error_of("index", *options, "--data", more, "--append")
    assert run("verify", tmp_path / "idx").stdout.strip() == "sound"
