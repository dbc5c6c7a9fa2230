"""A run that is killed goes on from a checkpoint, to the rows that it would have had."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import dropinf

from .loops import CASES, saved_states, train


@pytest.mark.parametrize("name", ["gpt", "sum, sgd"])
def test_a_run_goes_on_from_a_checkpoint(name: str, tmp_path) -> None:
    case = CASES[name]
    model = case.model()
    begun = copy.deepcopy(model)
    whole, _ = train(case, model, 70, out=tmp_path / "whole", sketch=dropinf.Dropout(5))
    checkpoint = copy.deepcopy(saved_states[66])

    class KilledError(Exception):
        pass

    def stop(step: int) -> None:
        if step == 68:
            raise KilledError

    with pytest.raises(KilledError):
        train(case, copy.deepcopy(begun), 70, out=tmp_path / "cut", sketch=dropinf.Dropout(5), before=stop)
    assert len(dropinf.Run(tmp_path / "cut")) == 68
    if name == "sum, sgd":
        with pytest.raises(ValueError, match="holds steps 0 to 68, and the optimizer has taken 0"):
            train(case, begun, 70, out=tmp_path / "cut", sketch=dropinf.Dropout(5), saved=checkpoint, begin=66)
        case = type(case)(**{**vars(case), "options": {"step": 66}})
    run, _ = train(case, begun, 70, out=tmp_path / "cut", sketch=dropinf.Dropout(5), saved=checkpoint, begin=66)
    assert len(run) == 70
    for i in range(70):
        assert run.ids(i) == whole.ids(i)
        assert torch.equal(run.rows(i), whole.rows(i))
    assert all(map(torch.equal, run.state(70), whole.state(70)))
    assert all(map(torch.equal, begun.parameters(), model.parameters()))


def test_a_run_that_begins_in_mid_training_takes_the_optimizers_state(tmp_path) -> None:
    case = CASES["gpt"]
    model = case.model()
    train(case, model, 5)
    _, optimizer = train(case, model, 5)
    run, optimizer = train(
        case, model, 9, out=tmp_path, sketch=dropinf.Dropout(5), saved=copy.deepcopy(saved_states[5]), begin=5
    )
    assert len(run) == 4
    layer = run._layers["blocks.0.up"]
    want = layer.compress_exact(optimizer.state[model.blocks[0].up.weight]["exp_avg"][None]).flatten()
    begin = sum(
        w
        for n, w in zip(run.shapes, run.columns.widths, strict=True)
        if list(run.shapes).index(n) < list(run.shapes).index("blocks.0.up")
    )
    torch.testing.assert_close(run.state(4)[0][begin : begin + len(want)].float(), want, rtol=1e-4, atol=1e-8)


def test_a_folder_of_another_run_is_refused(tmp_path) -> None:
    case = CASES["mlp"]
    train(case, case.model(), 3, out=tmp_path, sketch=dropinf.Dropout(5))
    with pytest.raises(ValueError, match="holds steps 0 to 3, and the optimizer has taken 0"):
        train(case, case.model(), 3, out=tmp_path, sketch=dropinf.Dropout(5))
    with pytest.raises(ValueError, match="holds a run with another"):
        train(case, case.model(), 3, out=tmp_path, sketch=dropinf.Dropout(6))
    assert len(dropinf.Run(tmp_path)) == 3


def test_a_kill_leaves_whole_steps(tmp_path) -> None:
    program = textwrap.dedent(f"""
        import torch, dropinf
        from tests.recording.loops import CASES, train
        torch.manual_seed(0)
        case = CASES["mlp"]
        train(case, case.model(), 10**6, out={str(tmp_path)!r}, sketch=dropinf.Dropout(5))
    """)
    process = subprocess.Popen([sys.executable, "-c", program])
    file = tmp_path / "steps-0.bin"
    try:
        while process.poll() is None and not (file.exists() and file.stat().st_size > 100_000):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with open(file, "ab") as torn:
        torn.write((10**6).to_bytes(8, "little") + bytes(100))
    run = dropinf.Run(tmp_path)
    assert len(run) > 10
    torch.manual_seed(0)
    case = CASES["mlp"]
    again, _ = train(case, case.model(), len(run), out=tmp_path / "again", sketch=dropinf.Dropout(5))
    for i in range(len(run)):
        assert torch.equal(run.rows(i), again.rows(i))
    model = case.model()
    query = dropinf.Compressor.from_masks(run.masks, model, lambda m, b: m(b[0]).square().sum(1)).compress(
        [case.batch(0)]
    )
    with pytest.raises(ValueError, match="was not ended"):
        dropinf.score(query, run, kind="adamw")
