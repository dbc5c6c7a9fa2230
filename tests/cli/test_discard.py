"""`dropinf index --discard` gives up an append that was not finished; what begins like an earlier run is its own."""

from __future__ import annotations

import pytest

import dropinf
from dropinf.text.passages import read_passages
from tests.cli.commands import error_of, make_passages, run, write_jsonl
from tests.cli.test_index_again import stop_at
from tests.index.small import files


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("at", [1, 4])
def test_an_append_is_given_up(common, named, at, tmp_path, monkeypatch):
    options = [*(common if named else [x for x in common if x not in ("--id-field", "id")]), "--out", tmp_path / "idx"]
    run("index", *options)
    before = files(tmp_path / "idx")
    more = write_jsonl(tmp_path / "more.jsonl", make_passages(30, 3, "q"))
    with monkeypatch.context() as patch:
        stop_at(patch, at)
        run("index", *options, "--data", more, "--append", code=130)
    other = write_jsonl(tmp_path / "other.jsonl", make_passages(20, 5, "r"))
    message = error_of("index", *options, "--data", other, "--append")
    assert "was begun with others" in message
    assert message.endswith("to give up what was appended of them: dropinf index --discard")
    done = run("index", "--discard", "--out", tmp_path / "idx")
    assert done.stderr == f"{tmp_path / 'idx'}: gave up what was appended last; 50 samples\n"
    assert files(tmp_path / "idx") == before
    assert run("verify", tmp_path / "idx").stdout == "sound\n"
    assert "nothing to give up; 50 samples" in run("index", "--discard", "--out", tmp_path / "idx").stderr
    run("index", *options, "--data", other, "--append")
    assert len(read_passages(tmp_path / "idx" / "passages.jsonl", id_field="id")) == len(
        dropinf.Index.open(tmp_path / "idx")
    )


def test_an_append_that_was_ended_before_its_run_began(common, tmp_path, monkeypatch):
    """Its passages are there, and no run of them."""
    options = [*common, "--out", tmp_path / "idx"]
    run("index", *options)
    before = files(tmp_path / "idx")
    more = write_jsonl(tmp_path / "more.jsonl", make_passages(30, 3, "q"))
    with monkeypatch.context() as patch:

        def ends(*_, **__):
            raise KeyboardInterrupt

        patch.setattr("dropinf.cli.index.write_index", ends)
        run("index", *options, "--data", more, "--append", code=130)
    assert files(tmp_path / "idx") != before
    run("index", "--discard", "--out", tmp_path / "idx")
    assert files(tmp_path / "idx") == before


def test_a_damaged_file_of_passages_stays_as_it_is(common, tmp_path):
    run("index", *common, "--out", tmp_path / "idx")
    path = tmp_path / "idx" / "passages.jsonl"
    path.write_bytes(path.read_bytes().replace(b"the", b"THE", 1))
    before = files(tmp_path / "idx")
    run("index", "--discard", "--out", tmp_path / "idx")
    assert files(tmp_path / "idx") == before


@pytest.mark.parametrize("options", [["--append"], ["--model", "x"], ["--data", "x"], ["--loader", "a:b"]])
def test_it_goes_with_out_alone(options, tmp_path):
    assert "it goes with --out alone" in run("index", "--discard", "--out", tmp_path, *options, code=2).stderr


def test_nothing_to_go_back_to(common, tmp_path, monkeypatch):
    assert "no index" in error_of("index", "--discard", "--out", tmp_path / "idx")
    assert not (tmp_path / "idx").exists()
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        run("index", *common, "--out", tmp_path / "idx", code=130)
    before = files(tmp_path / "idx")
    message = error_of("index", "--discard", "--out", tmp_path / "idx")
    assert message.endswith("no run in it is finished, so there is nothing to go back to; delete the folder")
    assert files(tmp_path / "idx") == before


@pytest.mark.parametrize("again", [False, True])
def test_an_append_that_begins_like_the_first_run(common, again, tmp_path):
    """Of numbered passages: the longest come first, and they are the same, in as many batches."""
    options = [*[x for x in common if x not in ("--id-field", "id")], "--out", tmp_path / "idx"]
    run("index", *options)
    passages = make_passages(50)
    shortest = min(range(50), key=lambda i: len(passages[i].text.split()))
    words = passages[shortest].text.split()
    changed = [
        p.__class__(p.id, " ".join(reversed([*words[:-1], "the"])), p.label) if i == shortest else p
        for i, p in enumerate(passages)
    ]
    if again:
        changed = passages
    more = write_jsonl(tmp_path / "more.jsonl", changed)
    for _ in range(2):
        run("index", *options, "--data", more, "--append")
        index = dropinf.Index.open(tmp_path / "idx")
        assert len(index) == (50 if again else 100)
        assert sorted(index.ids(), key=int) == [str(i) for i in range(len(index))]
        assert index.verify() == []
