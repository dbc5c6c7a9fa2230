"""An index, and the same gradients in memory."""

from __future__ import annotations

import pytest

from tests.index.small import make_batches, make_compressor, names


@pytest.fixture(scope="module")
def train():
    return make_compressor().compress(make_batches())


@pytest.fixture(scope="module")
def query():
    return make_compressor().compress(make_batches(2, 9))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_compressor().compress(
        make_batches(), out=tmp_path_factory.mktemp("index") / "idx", ids=names, fisher="block"
    )
