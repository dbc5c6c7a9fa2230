"""What cannot be sketched in dattri-llm is said in one line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
from dattri_llm import (
    REGISTER_ALL,
    HookManagerConfig,
)

import dropinf
from dropinf.interop.dattri_llm import sketched
from tests.interop.dattri_llm.models import (
    Odd,
)

# Its backward hook on the first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def test_other_layers_are_refused_in_one_line(trained):
    model = trained[0]
    with pytest.raises(ValueError, match=r"^config: layer embed \(Embedding\) is not linear; leave it out, or give it"):
        sketched(HookManagerConfig(linear_io=REGISTER_ALL), Odd(), dropinf.Dropout(4))
    with pytest.raises(ValueError, match=r"^config: layer lm_head is not a linear layer, called as a module, with a"):
        sketched(HookManagerConfig(linear_io=["lm_head"]), model, dropinf.Dropout(4))
    with pytest.raises(ValueError, match=r"^config: layer head is not a linear layer.*; leave it out, or use mode="):
        sketched(HookManagerConfig(linear_io=["head"]), Odd(), dropinf.Dropout(4, mode="flat"))
    with pytest.raises(ValueError, match=r"^config: it hooks no linear layer; name some in linear_io, or pass REG"):
        sketched(HookManagerConfig(param_grad=["norm"]), Odd(), dropinf.Dropout(4))
    with pytest.raises(RuntimeError, match="needs statistics of the data"):
        sketched(HookManagerConfig(linear_io=["head"]), Odd(), dropinf.PCA(4))


def test_versions_are_refused_in_one_line(monkeypatch):
    path = Path(dropinf.__file__).parent / "interop" / "dattri_llm.py"
    spec = importlib.util.spec_from_file_location("dropinf.interop.fresh", path)
    for error, found in {
        "dattri-llm is not installed; run: pip install dattri-llm==0.1.0": importlib.metadata.PackageNotFoundError,
        "dattri-llm is 0.2.0; this adapter reaches into that of 0.1.0: pip install dattri-llm==0.1.0": "0.2.0",
    }.items():

        def version(_, found=found):
            if isinstance(found, str):
                return found
            raise found

        monkeypatch.setattr("dropinf.interop.version", version)
        with pytest.raises(ImportError) as caught:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert str(caught.value) == error
