"""A refinement that was ended goes on to the same bytes, and a file of other work is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

import dropinf
from tests.directions.dense import of_direction, work

KILLED = """
import os, signal, sys
import dropinf.directions.state as state
from tests.directions.dense import work
import dropinf

found, write = work("mlp"), state.write_whole
def killing(path, data, check=None):
    write(path, data, check)
    if dropinf_steps() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
taken = 0
def dropinf_steps():
    global taken
    taken += 1
    return taken
state.write_whole = killing
dropinf.refine(found.model, found.queries, found.batches, found.loss_fn, damping=0.1, steps=5, out=sys.argv[1])
"""


def refine(found, out, **options):
    options = {"damping": 0.1, "steps": 5} | options
    return dropinf.refine(found.model, found.queries, found.batches, found.loss_fn, out=out, **options)


def assert_same(a, b, model):
    assert torch.equal(of_direction(a.direction, model), of_direction(b.direction, model))
    assert torch.equal(a.residuals, b.residuals)
    assert a.damping == b.damping


@pytest.mark.parametrize("options", [{}, {"steps": 300, "tolerance": 1e-9}], ids=["steps", "tolerance"])
def test_more_steps_go_on_from_the_file(tmp_path, options):
    found = work("mlp")
    whole = refine(found, tmp_path / "whole", **options)
    assert len(refine(found, tmp_path / "parts", steps=2).residuals) == 3
    parts = refine(found, tmp_path / "parts", **options)
    assert_same(parts, whole, found.model)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert_same(refine(found, tmp_path / "parts", **options), whole, found.model)  # nothing left to do
    assert sorted(os.listdir(tmp_path)) == ["parts", "whole"]


def test_a_killed_process_goes_on(tmp_path):
    found = work("mlp")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(refine(found, tmp_path / "killed", steps=2).residuals) == 3
    refine(found, tmp_path / "killed")
    refine(found, tmp_path / "whole")
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_tolerance_that_was_not_reached_goes_on(tmp_path):
    found = work("mlp")
    with pytest.raises(ValueError, match=r"tolerance is 1e-09, and after 2 steps .* more steps"):
        refine(found, tmp_path / "x", steps=2, tolerance=1e-9)
    found_late = refine(found, tmp_path / "x", steps=300, tolerance=1e-9)
    assert_same(found_late, refine(found, tmp_path / "y", steps=300, tolerance=1e-9), found.model)


def _other_weights(found):
    with torch.no_grad():
        found.model[0].weight[0, 0] += 1
    return found, {}


OTHERS = {
    "model": _other_weights,
    "damping": lambda found: (found, {"damping": 0.2}),
    "absolute": lambda found: (found, {"absolute": True}),
    "queries": lambda found: (found._replace(queries=found.queries[::-1]), {}),
    "batches": lambda found: (found._replace(batches=found.batches[::-1]), {}),
    "parameters": lambda found: (found, {"layers": "0"}),
    "losses": lambda found: (found, {"query_loss": lambda model, batch: model(batch[0])[:, 0]}),
    "curvature": lambda found: (found, found.options),
    "start": lambda found: (found, {"start": _start(found)}),
}


def _start(found):
    compressor = dropinf.Compressor(found.model, dropinf.Dropout(3), found.loss_fn)
    return dropinf.direction(compressor.compress(found.queries), None, compressor)


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_other_work_is_refused(tmp_path, what):
    found = work("mlp")
    refine(found, tmp_path / "x", steps=1)
    other, options = OTHERS[what](found)
    with pytest.raises(ValueError, match=what):
        refine(other, tmp_path / "x", **options)


def test_fewer_steps_than_were_taken_are_refused(tmp_path):
    found = work("mlp")
    refine(found, tmp_path / "x", steps=3)
    with pytest.raises(ValueError, match="has taken 3"):
        refine(found, tmp_path / "x", steps=2)


def test_a_damaged_file_is_refused(tmp_path):
    found = work("mlp")
    refine(found, tmp_path / "x", steps=1)
    data = bytearray((tmp_path / "x").read_bytes())
    data[-5] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        refine(found, tmp_path / "x")
    (tmp_path / "x").write_bytes(data[:100])
    with pytest.raises(ValueError, match="not a whole file that refine wrote"):
        refine(found, tmp_path / "x")
