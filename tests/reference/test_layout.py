"""One op, one name: its body, its kernel and its proofs carry it."""

from __future__ import annotations

from pathlib import Path

import pytest

import dropinf_kernels as kernels
from dropinf_kernels.op import launcher_of

ROOT = Path(kernels.__file__).parents[1]
NAMES = {
    "linear": {"compress_linear", "compress_linear_int8", "compress_linear_into"},
    "conv": {"compress_conv", "compress_conv_int8", "sketch_patches", "conv_output_size"},
    "embedding": {"compress_embedding", "compress_embedding_int8"},
    "norm": {"compress_norm", "compress_norm_int8"},
    "flat": {"compress_flat", "compress_flat_int8"},
    "sketch": {"sketch"},
    "gram": {"gram_update"},
    "topk": {"score_topk"},
    "quantize": {"quantize_rows", "dequantize_rows"},
    "bits": {"quantize_bits", "dequantize_bits", "score_topk_bits"},
}
# What lies beside these names: helpers, and tests of all ops together.
BESIDE = {
    "dropinf_kernels/ops": {"__init__", "checks", "plain"},
    "dropinf_kernels/gpu": {"__init__", "launch", "replay", "tiles", "tiling"},
    "tests/cases": {"common"},
    "tests/reference": {
        "conftest", "helpers", "test_gpu_bench", "test_layout", "test_registration", "test_routing", "test_tiling",
    },
    "tests/interpreter": {"conftest", "helpers", "sorting", "test_int8", "test_offsets", "test_replay", "test_traffic"},
    "tests/compile": {"fake_gpu", "machine_code", "test_replay"},
    "tests/sanitizer": {"accesses", "clients", "conftest", "test_planted"},
}  # fmt: skip


@pytest.mark.parametrize("folder", BESIDE)
def test_every_folder_has_a_file_for_each_op(folder):
    prefix = "test_" if folder.startswith("tests/") and folder != "tests/cases" else ""
    found = {path.stem for path in (ROOT / folder).glob("*.py")}
    assert found == {f"{prefix}{name}" for name in NAMES} | BESIDE[folder]


def test_every_public_name_belongs_to_one_op():
    assert sorted(kernels.__all__) == sorted(name for names in NAMES.values() for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_an_op_is_declared_and_launched_in_the_files_of_its_name(name):
    for public in NAMES[name]:
        declared = getattr(kernels, public)
        assert declared.__module__ == f"dropinf_kernels.ops.{name}"
        if public != "conv_output_size":
            assert launcher_of(declared).__module__ == f"dropinf_kernels.gpu.{name}"
