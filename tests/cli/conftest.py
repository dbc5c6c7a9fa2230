"""An index that most tests of commands ask, and a module for --loader."""

from __future__ import annotations

import sys

import pytest

import dropinf
from dropinf.transformer import TextModel
from tests.cli.commands import (
    LOADER,
    make_passages,
    run,
    write_jsonl,
)
from tests.text.models import folders_in


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a model and its tokenizer, by name; see `folders_in`."""
    return folders_in(tmp_path_factory)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", make_passages(50))


@pytest.fixture(scope="session")
def common(folders, data):
    """The options of most indexes here: 50 passages in 14 batches."""
    return ["--model", folders("gpt2"), "--data", data, "--id-field", "id", "--dim", 3, "--tokens-per-batch", 32]


@pytest.fixture(scope="session")
def made(tmp_path_factory, common):
    """An index, what the command printed, and the same in memory: (folder, result, compressor, workload, rows)."""
    folder = tmp_path_factory.mktemp("made") / "idx"
    done = run("index", *common, "--out", folder)
    model = TextModel(common[1])
    work = model.workload(make_passages(50), tokens_per_batch=32)
    compressor = dropinf.Compressor(work.model, dropinf.Dropout(3), work.loss_fn)
    return folder, done, compressor, model, compressor.compress(work.batches, order=work.batches.order)


@pytest.fixture
def loader(tmp_path, monkeypatch):
    """A folder with a module for --loader, as the current one."""
    (tmp_path / "my_model.py").write_text(LOADER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    yield tmp_path
    sys.modules.pop("my_model", None)
