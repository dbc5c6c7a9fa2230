"""What was unclear once: an index that is not finished, forged entries of a manifest, and the C locale."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest

import dropinf
from dropinf.index.manifest import Manifest
from tests.cli.commands import LOADER, QUERIES, environment, error_of, run


def test_info_of_an_index_that_is_not_finished(loader, monkeypatch):
    (loader / "my_model.py").write_text(LOADER.replace("time.sleep(3600)", "raise ValueError('ended')"))
    monkeypatch.syspath_prepend(loader)
    my_model = importlib.import_module("my_model")
    my_model.STALLS_AT = 5
    assert error_of("index", "--loader", "my_model:load", "--out", "idx") == "ended"
    shown = run("info", "idx").stdout
    assert "no, 5 of 12 batches are done: run the same command again, which goes on from there" in shown
    assert "loader           my_model:load" in shown
    found = json.loads(run("info", "idx", "--json").stdout)
    assert (found["finished"], found["batches_done"], found["batches"]) == (False, 5, 12)
    assert f"\nclasses and constants {found['about']['classes and constants']}\n" in shown
    assert "not finished" in error_of("self-influence", "idx")
    my_model.STALLS_AT = 1000
    run("index", "--loader", "my_model:load", "--out", "idx")
    assert json.loads(run("info", "idx", "--json").stdout)["finished"] is True


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dim", "[" * 100_000),
        ("dim", '"3"'),
        ("dim", "-3"),
        ("dim", "3.0"),
        ("packed", "1"),
        ("layers", "7"),
        ("layers", "[1]"),
        ("task", "guess"),
        ("dtype", "float8"),
        ("tokens_per_batch", "null"),
    ],
)
def test_a_forged_about_names_the_entry(name, text, made, tmp_path):
    folder = tmp_path / "idx"
    folder.mkdir()
    for path in made[0].iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "manifest.json").unlink()
    manifest = Manifest.load(made[0])
    replace(manifest, about={**manifest.about, name: text}).save(folder)
    found = error_of("query", folder, "--text", QUERIES[0])
    assert found.startswith(f"manifest: about has {name!r}: ")
    assert len(found) < 200
    assert len(dropinf.Index.open(folder)) == 50


def test_commands_in_the_c_locale(loader):
    source = LOADER.replace('f"{float(x):.9f}"', 'f"é名{float(x):.9f}"')
    (loader / "my_model.py").write_text(source, encoding="utf-8")
    bare = environment() | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    commands = (
        ["index", "--loader", "my_model:load", "--out", "ïdx"],
        ["self-influence", "ïdx"],
        ["query", "ïdx", "--loader", "my_model:queries", "--html", "page.html"],
        ["export", "ïdx", "rows.npy"],
        ["info", "ïdx"],
        ["verify", "ïdx"],
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "dropinf.cli", *command], capture_output=True, env=bare, cwd=loader, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == b"sound\n"
    assert dropinf.Index.open(loader / "ïdx").ids(0)[0].startswith("é名")
    page = (loader / "page.html").read_text(encoding="utf-8")
    assert "é名" in page or "\\u00e9\\u540d" in page
