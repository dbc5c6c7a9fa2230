"""Names and texts that others wrote are shown as text: no terminal obeys what stands in them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import dropinf
from dropinf.cli.console import plain
from tests.cli.commands import error_of, run

EVIL = "a\x1b]0;owned\x07\x9b2J\x7f\u202eb"
SHOWN = r"a\x1b]0;owned\x07\x9b2J\x7f\u202eb"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """An index of which the ids, the passages and what the manifest says of it hold escapes."""
    folder = tmp_path_factory.mktemp("hostile") / "idx"
    model = nn.Linear(4, 3).double()
    batches = [torch.randn(5, 4).double()]
    compressor = dropinf.Compressor(model, dropinf.Identity(), lambda model, batch: model(batch).square().sum(1))
    names = [f"{EVIL}{i}" for i in range(5)]
    index = compressor.compress(batches, out=folder, ids=lambda batch: names, fisher="block")
    lines = "".join(json.dumps({"id": name, "text": f"text {EVIL}"}) + "\n" for name in names)
    (folder / "passages.jsonl").write_text(lines)
    manifest = index.manifest.with_file("passages.jsonl", dropinf.files.file_checksum(folder / "passages.jsonl"))
    replace(manifest, about={"model": EVIL, f"x{EVIL}": "y"}).save(folder)
    return folder


def test_what_is_plain_stays():
    assert plain("héllo 'x' 日本 🙂") == "héllo 'x' 日本 🙂"
    assert plain(EVIL) == SHOWN
    assert plain("a\nb\tc\r\udc80") == r"a\nb\tc\r\udc80"


def safe(text: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in text), repr(text)


def test_tables_and_facts(hostile, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    found = run("self-influence", hostile).stdout
    safe(found)
    assert r"text a\x1b]0;owned\x07\x9b2J\x7f\u202eb" in found
    assert r"a\x1b]0;owned" in found
    found = run("info", hostile).stdout
    safe(found)
    assert f"{'model':<17}{SHOWN}\n" in found


def test_errors_and_notes(hostile, tmp_path, monkeypatch):
    folder = tmp_path / EVIL
    message = error_of("info", folder)
    safe(message)
    assert SHOWN in message
    done = run("export", hostile, f"{folder}.npy")
    safe(done.stderr)
    assert f"{SHOWN}.npy" in done.stderr
    damaged = tmp_path / f"{EVIL}2"
    hostile.rename(damaged)
    try:
        (damaged / "passages.jsonl").write_text("")
        found = run("verify", damaged, code=1).stdout
        safe(found)
        assert f"{SHOWN}2/passages.jsonl: damaged" in found
    finally:
        damaged.rename(hostile)
