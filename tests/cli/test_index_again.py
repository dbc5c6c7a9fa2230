"""`dropinf index` in a folder with an index: it goes on, adds passages, or refuses what does not belong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import dropinf
from dropinf.index.writer import Writer
from dropinf.text.passages import Passage, read_passages
from dropinf.text.transformer import TextBatches
from tests.cli.commands import (
    QUERIES,
    error_of,
    make_passages,
    query_json,
    run,
    write_jsonl,
)
from tests.index.small import files


def stop_at(monkeypatch, batch: int):
    """Ctrl-C as the batch of that number is made."""
    build = TextBatches.__getitem__

    def stop(self, index):
        if index == batch and len(self) > batch:
            raise KeyboardInterrupt
        return build(self, index)

    monkeypatch.setattr(TextBatches, "__getitem__", stop)


@pytest.mark.parametrize("how", [["--sampling", "energy"], ["--packed"]])
def test_an_interrupted_index_goes_on(common, how, tmp_path, monkeypatch):
    options = [*common, *how, "--calibration", 8]
    run("index", *options, "--out", tmp_path / "whole")
    count = len(dropinf.Index.open(tmp_path / "whole").manifest.runs[0].shards)
    assert count > 8
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        done = run("index", *options, "--out", tmp_path / "idx", code=130)
    assert done.stderr.splitlines()[-1] == "dropinf: stopped; run the same command again to go on"
    assert f"no, 8 of {count} batches are done: run the same command again" in run("info", tmp_path / "idx").stdout
    assert "not finished" in run("verify", tmp_path / "idx", code=1).stdout
    with monkeypatch.context() as patch:
        patch.setattr(dropinf.Compressor, "calibrate", lambda *_, **__: pytest.fail("it calibrates again"))
        run("index", *options, "--out", tmp_path / "idx")
        assert files(tmp_path / "idx") == files(tmp_path / "whole")
        assert "nothing was left to compress" in run("index", *options, "--out", tmp_path / "idx").stderr
    assert files(tmp_path / "idx") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--dim", 4], "was made with --dim 3, and this is --dim 4; run the same command again, or name another"),
        (["--seed", 1], "was made with --seed 0, and this is --seed 1"),
        (["--layers", "*mlp*", "--layers", "*attn*"], "was made with no --layers, and this is --layers *mlp* --layers *attn*"),
        (["--packed"], "was made with no --packed, and this is --packed"),
        (["--dtype", "int8"], "was made with --dtype float32, and this is --dtype int8"),
        (["--max-tokens", 9], "was made with --max-tokens 32, and this is --max-tokens 9"),
        (["--limit", 49], "its passages are others than those of the data now, from line 50 on; pass the data of then"),
        (["--limit", 20], "holds others' gradients (the first batch is another); pass --append to add these, or name another folder"),
        (["--model", "other"], "its weights are not those that"),
    ],
)  # fmt: skip
def test_another_command_is_refused(common, made, folders, changed, message):
    if changed[1:] == ["other"]:
        changed = ["--model", folders("gpt2", initializer_range=0.2)]
    before = files(made[0])
    assert message in error_of("index", *common, *changed, "--out", made[0])
    assert files(made[0]) == before


def test_changed_passages_are_refused(common, made, tmp_path):
    """Of the same tokens, which the checksum of a batch cannot tell apart."""
    passages = make_passages(50)
    passages[7] = Passage("other", passages[7].text, 0)
    before = files(made[0])
    other = write_jsonl(tmp_path / "other.jsonl", passages)
    message = error_of("index", *common, "--data", other, "--out", made[0])
    assert message.startswith(
        f"{made[0] / 'passages.jsonl'}: its passages are others than those of the data now, from line 8 on"
    )
    assert files(made[0]) == before
    lost = made[0] / "passages.jsonl"
    kept = lost.read_bytes()
    lost.unlink()
    run("index", *common, "--out", made[0])
    assert lost.read_bytes() == kept


@pytest.mark.parametrize("named", [True, False])
def test_appended_passages(common, made, named, tmp_path):
    folder, more = tmp_path / "idx", make_passages(11, 3, "q")
    options = common if named else [x for x in common if x not in ("--id-field", "id")]
    second = ["--data", write_jsonl(tmp_path / "more.jsonl", more), "--append", "--out", folder]
    run("index", *options, "--out", folder)
    first = files(folder)
    run("index", *options, *second)
    index = dropinf.Index.open(folder)
    every = [*make_passages(50), *more]
    if not named:
        every = [Passage(str(i), p.text) for i, p in enumerate(every)]
    kept = read_passages(folder / "passages.jsonl", id_field="id")
    assert [(p.id, p.text) for p in kept] == [(p.id, p.text) for p in every]
    torch.testing.assert_close(index[:50].flat, made[4].flat, rtol=1e-4, atol=1e-6)
    added = made[3].workload(every[50:], tokens_per_batch=32)
    rows = made[2].compress(added.batches, order=added.batches.order).flat
    torch.testing.assert_close(
        index[50:].flat, rows, rtol=1e-4, atol=1e-6
    )  # as many threads as there are cores to spare
    assert index.ids(slice(50, None)) == [p.id for p in every[50:]]
    assert index.fisher().count == 61
    samples = query_json(folder, "--text", QUERIES[0], "--top", 61)["queries"][0]["proponents"]
    texts = {p.id: p.text for p in every}
    assert len(samples) == 61
    assert all(sample["text"] == texts[sample["id"]] for sample in samples)
    assert run("verify", folder).stdout == "sound\n"
    whole = files(folder)
    for again in ([], second):  # either command finds its own there
        assert "nothing was left to compress" in run("index", *options, *again, "--out", folder).stderr
        assert files(folder) == whole
    # Ended between the passages and the manifest.
    for name, content in first.items():
        (folder / name).write_bytes(content)
    (folder / "passages.jsonl").write_bytes(whole["passages.jsonl"])
    assert "ended before its first row was made" in run("verify", folder, code=1).stdout
    run("index", *options, *second)
    assert files(folder) == whole
    if named:
        clash = write_jsonl(tmp_path / "clash.jsonl", [Passage("p3", "two dogs ran far away")])
        assert "id 'p3' is there already; ids must be unique" in error_of(
            "index", *options, "--data", clash, *second[2:]
        )
        assert files(folder) == whole


def but_sums(folder):
    """Without the Fisher matrix, which rounds otherwise where rows come in other shards, and what names it."""
    return {name: x for name, x in files(folder).items() if name not in ("fisher.safetensors", "manifest.json")}


@pytest.mark.parametrize("named", [True, False])
def test_appended_passages_in_merged_shards(common, named, tmp_path):
    folder, more = tmp_path / "idx", make_passages(11, 3, "q")
    options = common if named else [x for x in common if x not in ("--id-field", "id")]
    second = ["--data", write_jsonl(tmp_path / "more.jsonl", more), "--append"]
    run("index", *options, "--out", folder)
    run("index", *options, *second, "--out", folder)
    index = dropinf.Index.open(folder)
    before, shards = (index.ids(), index[:].flat), index.info()["shards"]
    assert run("compact", folder).stderr == f"{folder}: {shards} shards, now 1\n"
    merged = dropinf.Index.open(folder)
    assert merged.ids() == before[0]
    assert torch.equal(merged[:].flat, before[1])
    assert run("verify", folder).stdout == "sound\n"
    whole = but_sums(folder)
    for again in ([], second):
        assert "nothing was left to compress" in run("index", *options, *again, "--out", folder).stderr
        assert but_sums(folder) == whole
    run(
        "index",
        *options,
        *second,
        "--data",
        write_jsonl(tmp_path / "third.jsonl", make_passages(5, 4, "r")),
        "--out",
        folder,
    )
    assert len(dropinf.Index.open(folder)) == 66


@pytest.mark.parametrize("how", ["append", "query"])
def test_another_tokenizer_is_refused(how, common, folders, tmp_path):
    model = shutil.copytree(folders("gpt2"), tmp_path / "model")
    options = ["--model", model, *common[2:]]
    run("index", *options, "--out", tmp_path / "idx")
    more = [Passage(f"m{i}", p.text) for i, p in enumerate(make_passages(5))]
    again = ["--data", write_jsonl(tmp_path / "more.jsonl", more), "--append", "--out", tmp_path / "idx"]
    run("index", *options, *again)
    run("query", tmp_path / "idx", "--text", more[0].text, "--kind", "dot")
    path = model / "tokenizer.json"
    kept = json.loads(path.read_text())
    words = list(kept["model"]["vocab"])
    ids = [kept["model"]["vocab"][word] for word in words]
    kept["model"]["vocab"] = dict(zip(words, [*ids[:4], *ids[5:], ids[4]], strict=True))
    path.write_text(json.dumps(kept))
    asked = ["query", tmp_path / "idx", "--text", more[0].text, "--kind", "dot"]
    before = files(tmp_path / "idx")
    if how == "append":
        others = [Passage(f"n{i}", p.text) for i, p in enumerate(make_passages(5))]
        asked = [
            "index",
            *options,
            "--data",
            write_jsonl(tmp_path / "x.jsonl", others),
            "--append",
            "--out",
            tmp_path / "idx",
        ]
    assert "was made with another tokenizer of its model" in error_of(*asked)
    assert files(tmp_path / "idx") == before


def test_rows_without_passages_are_not_added_to_those_that_have_them(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "idx")
    work = made[3].workload(make_passages(60)[50:], tokens_per_batch=32)
    compressor = dropinf.Compressor.from_index(folder, work.model, work.loss_fn)
    before = files(folder)
    with pytest.raises(ValueError, match=r"keeps the passages of its samples \(passages.jsonl\), and these have none"):
        compressor.compress(work.batches, out=folder, ids=work.ids, append=True)
    assert files(folder) == before


def test_a_page_does_not_take_the_place_of_an_index_s_own_files(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "idx")
    before = files(folder)
    said = error_of("query", folder, "--text", "a b", "--kind", "dot", "--html", folder / "passages.jsonl")
    assert "a file of the index itself" in said
    assert files(folder) == before


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("append", [False, True])
def test_passages_of_a_run_of_which_nothing_was_stored_go_with_it(append, numbered, common, tmp_path, monkeypatch):
    def data(name, count):
        passages = [Passage(f"{name}{i}", p.text) for i, p in enumerate(make_passages(count, seed=ord(name)))]
        return ["--data", write_jsonl(tmp_path / f"{name}.jsonl", passages)]

    options = [*common[:2], *common[6:], *([] if numbered else ["--id-field", "id"]), "--out", tmp_path / "idx"]
    if append:
        run("index", *options, *data("a", 20))
    added = ["--append"] if append else []

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_keep", stop)
        run("index", *options, *added, *data("b", 12), code=130)
    run("index", *options, *added, *data("c", 9))
    index = dropinf.Index.open(tmp_path / "idx")
    kept = [passage.id for passage in read_passages(tmp_path / "idx" / "passages.jsonl", id_field="id")]
    assert index.ids() == kept
    assert len(kept) == len(set(kept)) == (29 if append else 9)
    assert index.verify() == []


@pytest.mark.parametrize("first", ["named", "numbered"])
def test_an_append_names_samples_as_before(first, folders, tmp_path):
    data, more = (write_jsonl(tmp_path / name, make_passages(n)) for name, n in (("data.jsonl", 8), ("more.jsonl", 12)))
    options = ["--model", folders("gpt2"), "--dim", 3, "--out", tmp_path / "idx"]
    ways = {"named": ["--id-field", "id"], "numbered": []}
    run("index", *options, *ways.pop(first), "--data", data)
    ((_, other),) = ways.items()
    assert "name samples in the same way" in error_of("index", *options, *other, "--data", more, "--append")
    assert run("verify", tmp_path / "idx").stdout.strip() == "sound"


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_masks_that_are_lost_are_drawn_again(damage, common, tmp_path):
    options = [*common, "--out", tmp_path / "idx"]
    run("index", *options)
    path = tmp_path / "idx" / "sketch.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[:-9])
    run("index", *options)
    assert path.read_bytes() == whole
    assert run("verify", tmp_path / "idx").stdout.strip() == "sound"
