"""`dropinf doctor` says what is installed, and finds an op that computes wrongly."""

from __future__ import annotations

import re

import numpy as np
import torch

from dropinf.cli import doctor
from tests.cli.commands import (
    run,
)


def test_doctor(monkeypatch):
    shown = run("doctor").stdout
    for name, value in (("torch", torch.__version__), ("numpy", np.__version__), ("dropinf", "0.1.0")):
        assert re.search(rf"^{name} +{re.escape(value)}$", shown, re.M)
    assert re.search(r"^self-check +compress_linear on \w+ equals float64 to rounding$", shown, re.M)
    if not torch.cuda.is_available():
        assert re.search(r"^GPU +none", shown, re.M)
        assert re.search(r"^kernels +plain PyTorch, as there is no GPU$", shown, re.M)
    assert re.search(r"^int8 products +in ", shown, re.M)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert re.search(r"^gguf +missing: pip install gguf \(GGUF files\)$", run("doctor").stdout, re.M)
    right = doctor.ops.compress_linear
    monkeypatch.setattr(doctor.ops, "compress_linear", lambda *tables: right(*tables) * 1.01)
    assert "broken: compress_linear on " in run("doctor", code=1).stdout

    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor.ops, "compress_linear", fail)
    assert "fails on " in run("doctor", code=1).stdout
