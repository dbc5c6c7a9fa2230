"""Any model by --loader, in one process, in several, and stopped by Control-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

import dropinf
from tests.bounds import HOUR
from tests.cli.commands import (
    LOADER,
    environment,
    error_of,
    fisher_of,
    query_json,
    run,
)
from tests.index.small import files


def test_any_model_by_a_loader(loader):
    done = run("index", "--loader", "my_model:load", "--dim", 4, "--out", "idx")
    assert "next: dropinf query idx --loader my_model:load" in done.stderr
    import my_model

    work, asked = my_model.load(), my_model.queries()
    compressor = dropinf.Compressor(work.model, dropinf.Dropout(4), work.loss_fn)
    rows, query = compressor.compress(work.batches).to(torch.float32), compressor.compress(asked.batches)
    assert torch.equal(dropinf.Index.open("idx")[:].flat, rows.flat)
    found = query_json("idx", "--loader", "my_model:queries", "--top", 3)
    best = dropinf.score(query, rows, fisher_of(rows), top=3)
    assert [q["id"] for q in found["queries"]] == [i for batch in asked.batches for i in asked.ids(batch)]
    names = [i for batch in work.batches for i in work.ids(batch)]
    for got, values, positions in zip(found["queries"], best.values.tolist(), best.indices.tolist(), strict=True):
        assert (got["text"], got["image"]) == (None, None)
        assert [(s["position"], s["id"], s["text"]) for s in got["proponents"]] == [
            (i, names[i], None) for i in positions
        ]
        assert [s["score"] for s in got["proponents"]] == pytest.approx(values, rel=1e-4)
    assert names[best.indices[0, 0]] in run("query", "idx", "--loader", "my_model:queries").stdout
    # An index of the Python API too, of some of the layers.
    part = dropinf.Compressor(work.model, dropinf.Dropout(4), work.loss_fn, layers=["2"])
    part.compress(work.batches, out="part", ids=work.ids)
    found = query_json("part", "--loader", "my_model:queries", "--kind", "dot", "--top", 1)
    expected = dropinf.score(part.compress(asked.batches), part.compress(work.batches), kind="dot", top=1)
    assert [q["proponents"][0]["score"] for q in found["queries"]] == pytest.approx(expected.values.flatten().tolist())
    assert "was not made from passages by dropinf index; pass its queries with --loader" in error_of(
        "query", "part", "--text", "a", "--kind", "dot"
    )


@pytest.mark.parametrize(
    ("loader_name", "message"),
    [
        ("my_model", "loader: 'my_model' must be module:function"),
        ("my_model:nothing", "loader: my_model has no function 'nothing'"),
        ("my_model:number", "loader: my_model:number returned int; it must return a dropinf.transformer.Workload"),
        ("not_there:load", "No module named 'not_there'"),
    ],
)
def test_what_is_wrong_with_a_loader(loader, loader_name, message):
    assert error_of("index", "--loader", loader_name, "--out", "idx").startswith(message)


def test_a_loader_calibrates_on_random_batches(loader):
    run("index", "--loader", "my_model:load", "--dim", 2, "--sampling", "energy", "--calibration", 4, "--out", "idx")
    import my_model

    work = my_model.load()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    expected = dropinf.Compressor(work.model, dropinf.Dropout(2, sampling="energy"), work.loss_fn)
    expected.calibrate([work.batches[i] for i in order[:2]])  # of three samples each
    assert dict(dropinf.Index.open("idx").digest) == expected.digest()


def test_control_c(loader):
    """In a process of its own."""
    (loader / "my_model.py").write_text(LOADER.replace("STALLS_AT = 1000", "STALLS_AT = 4"))
    command = [sys.executable, "-m", "dropinf.cli", "index", "--loader", "my_model:load", "--dim", "4", "--out", "idx"]
    # Where the tests run in the background, the signal is ignored, and processes inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        while len(list(loader.glob("idx/shards/*"))) < 4 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HOUR)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "dropinf: stopped; run the same command again to go on"
    (loader / "my_model.py").write_text(LOADER)
    for folder in ("idx", "whole"):
        run("index", "--loader", "my_model:load", "--dim", 4, "--out", folder)
    assert files(loader / "idx") == files(loader / "whole")


def test_ranks_of_torchrun_make_the_same_index(loader):
    """Rank 1 draws another sketch, as rounding might make it do, and takes that of rank 0."""
    drawn = (
        LOADER
        + """
import os
from dropinf import ranks
from dropinf.cli import index

ranks.PATIENCE = 3600

if os.environ.get("RANK") == "1":
    index._shuffled = lambda count, seed: range(count)
"""
    )
    (loader / "my_model.py").write_text(drawn)
    arguments = ["index", "--loader", "my_model:load", "--dim", "2", "--sampling", "energy", "--calibration", "9"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dropinf.cli",
    ]
    done = subprocess.run(
        [*torchrun, *arguments, "--out", "idx"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=HOUR,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert (
        done.stderr.count("compressed 36 samples in ")
        == done.stderr.count("next: ")
        == done.stderr.count("calibrating")
        == 1
    )
    run(*arguments, "--out", "whole")
    made, whole = files(loader / "idx"), files(loader / "whole")
    fishers = [kept.pop("fisher.safetensors") for kept in (made, whole)]  # of sums in another order
    assert len(fishers) == 2
    for kept in (made, whole):
        kept.pop("manifest.json")  # which has their checksum
    assert made == whole
    first, second = (dropinf.Index.open(loader / name) for name in ("idx", "whole"))
    torch.testing.assert_close(first.fisher().solve(first[:]).flat, second.fisher().solve(first[:]).flat)
