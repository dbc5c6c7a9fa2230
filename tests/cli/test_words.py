"""`dropinf query --tokens`: what each word of a passage adds to its exact score, beside plain autograd."""

from __future__ import annotations

import json

import pytest
import torch

import dropinf
from dropinf.cli.words import _words
from dropinf.text.passages import Passage
from tests.cli.commands import QUERIES, fisher_of, query_json, query_rows, run, write_jsonl


def parts_by_autograd(model, direction, q, text):
    """<grad of each token's part of the loss, direction q> of one passage, by a backward for each token."""
    batch = model.workload([Passage("", text)]).batches[0]
    named = {n: p for n, p in model.model.named_parameters() if n in direction.parameters}
    flags = [p.requires_grad for p in named.values()]
    try:
        for p in named.values():
            p.requires_grad_(True)
        losses = model.token_losses(model.model, batch)[0]
        found = [0.0]
        for loss in losses[1:]:
            gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
            products = zip(named, gradients, strict=True)
            found.append(float(sum((g.double() * direction.tensor(n, q)).sum() for n, g in products)))
    finally:
        for p, flag in zip(named.values(), flags, strict=True):
            p.requires_grad_(flag)
    return found


@pytest.mark.parametrize("kind", ["influence", "dot"])
def test_words_have_the_shares_of_their_tokens(made, kind):
    folder, _, compressor, model, rows = made
    asked = [x for text in QUERIES for x in ("--text", text)]
    found = query_json(folder, *asked, "--top", 3, "--kind", kind, "--tokens")
    plain = query_json(folder, *asked, "--top", 3, "--kind", kind)
    fisher = fisher_of(rows) if kind == "influence" else None
    d = dropinf.direction(query_rows(made), fisher, compressor)
    for q, (query, before) in enumerate(zip(found["queries"], plain["queries"], strict=True)):
        for side in ("proponents", "opponents"):
            assert len(query[side]) == 3
            for sample, same in zip(query[side], before[side], strict=True):
                words, exact = sample.pop("words"), sample.pop("exact")
                assert sample == same
                assert "".join(text for text, _ in words) == sample["text"]
                assert [text.strip() for text, _ in words] == [*sample["text"].split(), ""]
                expected = parts_by_autograd(model, d, q, sample["text"])  # a token is a word here
                largest = max(map(abs, expected))
                assert [share for _, share in words] == pytest.approx([*expected, 0], rel=1e-3, abs=1e-4 * largest)
                assert exact == pytest.approx(sum(share for _, share in words))
                assert exact == pytest.approx(sample["score"], rel=1e-3, abs=1e-3 * largest)


def test_the_page_has_them(made, tmp_path):
    done = run("query", made[0], "--text", QUERIES[0], "--tokens", "--json", "--html", tmp_path / "a.html")
    result = tmp_path / "result.json"
    result.write_text(done.stdout)
    run("report", result, "-o", tmp_path / "b.html")
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    first = json.loads(done.stdout)["queries"][0]["proponents"][0]
    assert json.dumps(first["words"], separators=(",", ":"))[1:-1] in page


def test_tokens_are_put_together_to_words():
    text = " un-\tlikely  end"
    places = [(0, 0), (1, 3), (3, 4), (4, 7), (7, 9), (9, 11), (13, 16), (16, 16), (0, 0)]
    shares = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64, 128, 999.0])
    assert _words(text, places, shares) == [(" ", 0), ("un-\t", 3), ("likely  ", 28), ("end", 32), ("", 192)]


def test_a_text_that_is_cut_has_words_without_shares(folders, tmp_path):
    passages = [Passage(f"p{i}", "the cat sat on a mat while two dogs") for i in range(3)]
    data = write_jsonl(tmp_path / "data.jsonl", passages)
    run("index", "--model", folders("gpt2"), "--data", data, "--dim", 3, "--max-tokens", 4, "--out", tmp_path / "idx")
    found = query_json(tmp_path / "idx", "--text", QUERIES[0], "--top", 1, "--tokens")
    words = found["queries"][0]["proponents"][0]["words"]
    assert "".join(text for text, _ in words) == passages[0].text
    assert [bool(share) for _, share in words] == [False, True, True, True, *[False] * 6]


def test_what_cannot_be_shown(made, folders, data, loader, tmp_path):
    def refused(*arguments):
        return " ".join(run("query", *arguments, "--tokens", code=2).stderr.replace("│", " ").split())

    asked = (made[0], "--text", QUERIES[0])
    assert "pass --html PAGE or --json" in refused(*asked)
    assert "--kind cosine is no product with a gradient" in refused(*asked, "--json", "--kind", "cosine")
    run("index", "--loader", "my_model:load", "--out", tmp_path / "loaded", "--dim", 3)
    assert "keeps neither" in refused(tmp_path / "loaded", "--loader", "my_model:queries", "--json")
    labelled = ("--model", folders("bert", pad=True), "--data", data, "--id-field", "id", "--label-field", "label")
    run("index", *labelled, "--dim", 3, "--out", tmp_path / "classes")
    ask = ("query", tmp_path / "classes", "--text", QUERIES[0], "--label", 1, "--json", "--tokens")
    assert "is a classifier; its loss has no tokens" in run(*ask, code=1).stderr
