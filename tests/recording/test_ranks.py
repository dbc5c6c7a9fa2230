"""A run that several ranks train together is the run of one that has all their samples."""

from __future__ import annotations

import socket
import subprocess
import sys

import torch
import torch.nn.functional as F

import dropinf

from .rank import STEPS, batch, model, train


def test_ranks_record_one_run(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.recording.rank"]
    ranks = [subprocess.Popen([*command, str(r), "2", str(port), str(tmp_path / "two")]) for r in range(2)]
    assert [process.wait(120) for process in ranks] == [0, 0]
    net = model()
    one, two = train(net, str(tmp_path / "one"), 0, 1), dropinf.Run(tmp_path / "two")
    assert len(one) == len(two) == STEPS
    for i in range(STEPS):
        assert one.ids(i) == two.ids(i)
        torch.testing.assert_close(one.rows(i), two.rows(i), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.step(i).gradient, two.step(i).gradient, rtol=1e-9, atol=1e-12)
        assert abs(one.step(i).clipped - two.step(i).clipped) < 1e-9
    assert min(one.step(i).clipped for i in range(STEPS)) < 1
    compressor = dropinf.Compressor.from_masks(
        one.masks, net, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")
    )
    query = compressor.compress([batch(99)])
    scores = [dropinf.score(query, run, kind="adamw", other_model=True).values for run in (one, two)]
    torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-12)
