"""The demo, run as a user runs it, and the report's own promises."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys

import numpy as np
import pytest

from dropinf.demo import report
from tests.bounds import HOUR

METHODS = {"dropout, recommended", "dropout", "gaussian", "pca", "uncompressed"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "dropinf.cli", "demo", "--out", str(out), "--seed", "1"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=HOUR, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # A minute on two cores, of which nobody else can take a part.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    return done.stdout, json.loads((out / "result.json").read_text()), (out / "report.html").read_text(), out


def test_result(run):
    _, result, _, out = run
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "result.json"]
    assert result["seed"] == 1
    assert result["flipped"] == result["samples"] // 10
    assert result["test_accuracy"] > 0.9
    for key in ("mislabel_auc", "bytes_per_sample", "score_correlation"):
        assert set(result[key]) == METHODS
    assert set(result["seconds"]) == METHODS | {"total"}
    agreement = result["score_correlation"]
    assert agreement["uncompressed"] == pytest.approx(1)
    assert all(0.2 < agreement[name] < 1 for name in METHODS - {"uncompressed"})
    assert 0.9 < result["loss_auc"] <= 1
    assert all(0.9 < auc <= 1 for auc in result["mislabel_auc"].values())
    sizes = result["bytes_per_sample"]
    assert (
        sizes["dropout"]
        == sizes["dropout, recommended"]
        == sizes["gaussian"]
        == sizes["pca"]
        < sizes["uncompressed"] / 10
    )


def test_terminal_shows_the_table(run):
    stdout, result, _, _ = run
    for name, auc in result["mislabel_auc"].items():
        assert re.search(rf"{name}.*{auc:.3f}", stdout)
    assert "result.json" in stdout
    assert "report.html" in stdout


def test_report_is_self_contained_and_complete(run):
    _, result, page, _ = run
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert not re.search(r"<(script|link|iframe)\b", page)
    assert page.count("data:image/png;base64,") == 24 + 6 * 11
    assert page.count("<article") == 6
    assert page.count("<svg") == 1
    assert "Proponents" in page
    assert "Opponents" in page
    assert re.search(r"flipped</span><br>true \d", page)
    for auc in (*result["mislabel_auc"].values(), result["loss_auc"]):
        assert f"{auc:.3f}" in page


def test_labels_are_escaped():
    images = report.LabelledImages(np.zeros((1, 2, 2)), ["<b>&"], ["<i>"])
    card = report.image_card(images, 0, note="<script>")
    assert "&lt;b&gt;&amp;" in card
    assert "&lt;i&gt;" in card
    assert "<script>" not in card
    with pytest.raises(ValueError, match="given has 2 labels, must have 1"):
        report.LabelledImages(np.zeros((1, 2, 2)), ["a", "b"])


@pytest.mark.parametrize(
    ("score", "text"), [(0.01234, "+0.0123"), (-1234.5, "\N{MINUS SIGN}1,234"), (999.4, "+999"), (999.9, "+1,000")]
)
def test_scores_are_readable(score, text):
    assert report.format_score(score) == text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "report.html"
    report.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        report.write_text(path, "half \ud800")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("missing", ["typer", "sklearn", "matplotlib"])
def test_a_missing_extra_is_one_clear_line(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['dropinf', 'demo']; from dropinf.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"dropinf: this command needs {missing}; install it with: pip install 'dropinf[demo]'"


def test_help_and_version():
    for argument, expected in (([], "demo"), (["--version"], "dropinf 0.1.0")):
        done = subprocess.run(
            [sys.executable, "-m", "dropinf.cli", *argument], capture_output=True, text=True, check=True
        )
        assert expected in done.stdout
