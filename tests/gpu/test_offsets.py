"""Offsets past 2^31 elements on real memory: the interpreter's problems, with every program of every launch."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter import test_offsets as stretching


@pytest.fixture(autouse=True)
def _real_memory(monkeypatch):
    monkeypatch.setattr(stretching, "uncommitted", lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        yield
    torch.cuda.empty_cache()


def needs(gib):
    """Skip where the largest of a test's problems does not fit."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"{free:.0f} GiB of GPU memory are free; this takes {gib}")


def compare(launcher, arguments, want, where):
    """Ask for the numbers of small inputs; what a wrong offset reads is zero, or nobody's."""
    got = stretching.results(launcher, arguments)
    # Folds of fp16 inputs round once more.
    torch.testing.assert_close(
        got, want, rtol=1e-2, atol=1e-2, msg=lambda text: f"{launcher.__name__}, {where}: {text}"
    )


@pytest.mark.parametrize("op", stretching.OPS)
def test_inputs_that_span_more_than_two_billion_elements(op):
    needs(40)
    for declared, arguments in stretching.calls(torch.float16)[op]:
        want = stretching.results(declared.triton, stretching.copies(arguments))
        for where, large in stretching.stretches(arguments):
            compare(declared.triton, large, want, where)
            # Before the next one is made: two at once would not fit.
            del large


@pytest.mark.parametrize("op", stretching.OPS)
def test_outputs_of_more_than_two_billion_elements(op):
    needs(56)
    for launcher, large, small in stretching.large_outputs(op):
        got, want = stretching.results(launcher, large), stretching.results(launcher, small)
        assert max(out.numel() for out in got) > 1 << 31
        # Another number of samples may choose other tiles, which sum in another order.
        torch.testing.assert_close([out.flatten()[-1] for out in got], [out.flatten()[-1] for out in want])
        del got, large
        torch.cuda.empty_cache()
