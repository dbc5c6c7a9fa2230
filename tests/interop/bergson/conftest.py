"""Fixtures of this toolkit's tests."""

from __future__ import annotations

import pytest
import torch
from bergson import (
    DataConfig,
    IndexConfig,
)
from bergson.config import DistributedConfig

from tests.interop.bergson.models import (
    make_data,
    make_model,
)


@pytest.fixture
def saved(tmp_path):
    """A model, its tokenizer and two data sets on disk, as bergson's command line reads them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    make_model(dtype=torch.float32).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)
    make_data().save_to_disk(str(tmp_path / "train"))
    make_data(3, start=2000).save_to_disk(str(tmp_path / "query"))

    def config(run, data, **options):
        return IndexConfig(
            run_path=str(tmp_path / run),
            model=str(folder),
            data=DataConfig(dataset=str(tmp_path / data)),
            token_batch_size=128,
            distributed=DistributedConfig(nproc_per_node=options.pop("processes", 1)),
            **options,
        )

    return config
