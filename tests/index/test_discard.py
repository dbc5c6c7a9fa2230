"""An append that was not finished can be given up, and nothing else is lost."""

from __future__ import annotations

import pytest
import torch

import dropinf
from dropinf.files import sync_folder, write_whole
from dropinf.index.folder import locked
from dropinf.ranks import Ranks
from tests.index.small import files, make_batches, make_compressor, names
from tests.index.test_runs import StopError, interrupted

MORE = make_batches(140, 5, rows=1)


def stopped_append(folder, at=70):
    made = make_compressor().compress(make_batches(), out=folder, ids=names, fisher="block")
    before = files(folder)
    with pytest.raises(StopError):
        make_compressor().compress(interrupted(MORE, at), out=folder, ids=names, append=True)
    return made, before


@pytest.mark.parametrize("at", [1, 70])
def test_an_append_is_given_up(at, train, tmp_path):
    made, before = stopped_append(tmp_path / "idx", at)
    with pytest.raises(
        ValueError, match=r"was begun with others .* to give up what was appended of them: Index\.discard"
    ):
        make_compressor().compress(make_batches(3, 8), out=made.path, ids=names, append=True)
    dropinf.Index.open(made.path).discard()
    assert files(made.path) == before
    index = make_compressor().compress(make_batches(3, 8), out=made.path, ids=names, append=True)
    assert torch.equal(index[:].flat, torch.cat([train.flat, make_compressor().compress(make_batches(3, 8)).flat]))
    assert index.verify() == []


def test_nothing_to_give_up(train, tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=names)
    before = files(index.path)
    index.discard()
    assert files(index.path) == before


def test_the_handle_goes_on(tmp_path):
    stopped_append(tmp_path / "idx")
    index = dropinf.Index.open(tmp_path / "idx")
    index.discard()
    index.save_fisher(dropinf.build_fisher(index, "diagonal"))
    assert index.fisher().kind == "diagonal"


def test_an_append_that_is_being_written_is_not_given_up(tmp_path):
    stopped_append(tmp_path / "idx")
    before = files(tmp_path / "idx")
    index = dropinf.Index.open(tmp_path / "idx")
    with locked(index.path, Ranks(None)), pytest.raises(ValueError, match="another process is writing to"):
        index.discard()
    assert files(index.path) == before


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("failing", range(3))
def test_killed_while_it_is_given_up(failing, finish, tmp_path, monkeypatch):
    """Rows go before the run does: it can be finished, or given up again."""
    _, before = stopped_append(tmp_path / "idx")
    index = dropinf.Index.open(tmp_path / "idx")
    kept = files(index.path)
    calls = []

    def stopping(real):
        def call(*arguments):
            calls.append(1)
            if len(calls) > failing:
                raise StopError
            real(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("dropinf.index.discard.sync_folder", "dropinf.index.manifest.write_whole"):
            patch.setattr(name, stopping(sync_folder if "sync" in name else write_whole))
        with pytest.raises(StopError):
            index.discard()
    now = files(index.path)
    assert before.items() - {("manifest.json", before["manifest.json"])} <= now.items() <= kept.items()
    assert torch.equal(dropinf.Index.open(index.path)[:].flat, index[:].flat)
    if finish:
        made = make_compressor().compress(MORE, out=index.path, ids=names, append=True)
        assert torch.equal(made[len(index) :].flat, make_compressor().compress(MORE).flat)
        return
    dropinf.Index.open(index.path).discard()
    assert files(index.path) == before
