"""An index of few bits from the command line: made, asked, exported and appended to."""

from __future__ import annotations

import json

import pytest
import torch

import dropinf
from dropinf.text.passages import Passage
from tests.cli.commands import QUERIES, error_of, make_passages, run, write_jsonl


@pytest.fixture(scope="module")
def few(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few") / "few"
    return folder, run("requantize", made[0], "--out", folder, "--bits", 2, "--bytes", 20)


def test_it_is_what_the_library_makes(few, made):
    folder, done = few
    code = dropinf.BitCode.fit(dropinf.Index.open(made[0]), "kronecker", bits=2, bytes_per_sample=20)
    index = dropinf.Index.open(folder)
    assert index.code.digest == code.digest
    assert "50 samples, 20 bytes each where they were" in done.stderr
    assert "for all together" in done.stderr
    assert run("verify", folder).stdout == "sound\n"
    assert json.loads(run("info", folder, "--json").stdout)["dtype"] == "2bit"


def test_a_query_is_scored_by_its_code(few, made):
    folder, _ = few
    *_, compressor, model, _ = made
    found = json.loads(run("query", folder, "--text", QUERIES[0], "--top", 5, "--json").stdout)
    work = model.workload([Passage("", QUERIES[0])])
    best = dropinf.score(compressor.compress(work.batches), dropinf.Index.open(folder), top=5)
    proponents = found["queries"][0]["proponents"]
    assert [p["score"] for p in proponents] == pytest.approx(best.values[0].tolist(), rel=1e-4)
    assert found["fisher"] == "kronecker, damping auto, in the code of its rows of 2 bits"
    assert "whose damping is that of their code" in error_of("query", folder, "--text", QUERIES[0], "--damping", "0.1")
    assert "rows of few bits have" in error_of("query", folder, "--text", QUERIES[0], "--kind", "cosine")


def test_it_has_no_fisher_matrix_of_its_own(few):
    assert "have their Fisher matrix in their code" in error_of("fisher", few[0])
    assert "have no self-influence" in error_of("self-influence", few[0])


def test_words_have_shares_of_exact_scores_by_the_fisher_matrix_of_the_code(few, made):
    folder, _ = few
    _, _, compressor, model, _ = made
    found = json.loads(run("query", folder, "--text", QUERIES[0], "--top", 4, "--tokens", "--json").stdout)
    rows = compressor.compress(model.workload([Passage("", QUERIES[0])]).batches)
    index, floats = dropinf.Index.open(folder), dropinf.Index.open(made[0])
    exact = dropinf.score(rows, floats, index.code.fisher)[0]
    place = {name: i for i, name in enumerate(floats.ids())}
    for side in ("proponents", "opponents"):
        for sample in found["queries"][0][side]:
            want = float(exact[place[sample["id"]]])
            assert sample["exact"] == pytest.approx(want, rel=1e-3, abs=1e-3 * float(exact.abs().max()))
            assert sum(share for _, share in sample["words"]) == pytest.approx(sample["exact"], rel=1e-4, abs=1e-6)


def test_it_is_exported_and_appended_to(few, common, tmp_path):
    folder, _ = few
    done = run("export", folder, tmp_path / "rows.npy")
    assert "multiply with index.code.queries(query)" in done.stderr
    data = write_jsonl(tmp_path / "more.jsonl", make_passages(3, 8, "q"))
    run("index", *common[:2], "--data", data, *common[4:], "--out", folder, "--append")
    grown = dropinf.Index.open(folder)
    assert len(grown) == 53
    assert grown.verify() == []
    assert torch.isfinite(grown[50:].flat).all()


def test_what_is_there_is_not_written_over(few, made):
    assert "which is there; name a new folder" in error_of("requantize", made[0], "--out", few[0])
