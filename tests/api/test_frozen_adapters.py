"""A PEFT model that was loaded with everything frozen: its adapters are tracked, and the warning says which."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import dropinf

from .oracle import assert_equal_gradients, oracle

peft = pytest.importorskip("peft")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.q, self.v, self.head = nn.Embedding(7, 5), nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.v(torch.tanh(self.q(self.table(ids)).sum(1)))))


def loss_fn(model, batch):
    return model(batch).square().sum(1)


CONFIGS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q", "v"], r=2, init_lora_weights=False),
    "head": lambda: peft.LoraConfig(target_modules=["q"], r=2, init_lora_weights=False, modules_to_save=["head"]),
    "tokens": lambda: peft.LoraConfig(target_modules=["q"], r=2, trainable_token_indices={"table": [1, 2]}),
    "dora": lambda: peft.LoraConfig(target_modules=["q", "v"], r=2, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["q", "v"], feedforward_modules=["v"]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q", "v"], r=2),
    "vera": lambda: peft.VeraConfig(target_modules=["v"], r=2),
    "oft": lambda: peft.OFTConfig(target_modules=["v"], oft_block_size=2),
    "parameter": lambda: peft.LoraConfig(target_modules=["q"], target_parameters=["v.weight"], r=2),
    "norm": lambda: peft.LNTuningConfig(target_modules=["v"]),
}


def saved(config, path):
    """Save an adapter of the base model; return the names of what it trains."""
    model = peft.get_peft_model(Base(), config)
    model.save_pretrained(path)
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_adapter_is_tracked(kind, tmp_path):
    trained = saved(CONFIGS[kind](), tmp_path)
    model = peft.PeftModel.from_pretrained(Base(), tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.warns(
        UserWarning, match=r"model: PEFT loaded it with every parameter frozen.* alone is tracked"
    ) as said:
        compressor = dropinf.Compressor(model, dropinf.Dropout(2), loss_fn)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert {layer.parameter for layer in compressor.layers.values()} == trained
    message = str(said[0].message)
    assert sorted(trained)[0].split(".")[0] in message
    assert "layers='*'" in message
    assert "is_trainable=True" in message
    assert set(compressor.skipped.values()) == {"frozen, beside a PEFT adapter; layers='*' tracks it"}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["head", "parameter"])
def test_its_gradients_are_those_of_a_trainable_one(kind, tmp_path):
    saved(CONFIGS[kind](), tmp_path)
    frozen, trainable = (
        peft.PeftModel.from_pretrained(Base(), tmp_path, is_trainable=t).double().eval() for t in (False, True)
    )
    ids = torch.randint(0, 7, (4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressor = dropinf.Compressor(frozen, dropinf.Dropout(2), loss_fn)
    assert_equal_gradients(compressor, compressor.compress([ids]), oracle(trainable, loss_fn, ids, 4))


@pytest.mark.filterwarnings("error")
def test_where_nothing_is_to_be_said(tmp_path):
    saved(CONFIGS["lora"](), tmp_path)
    frozen = peft.PeftModel.from_pretrained(Base(), tmp_path)
    everything = dropinf.Compressor(frozen, dropinf.Dropout(2), loss_fn, layers="*")
    assert {layer.parameter for layer in everything.layers.values()} == {n for n, _ in frozen.named_parameters()}
    path = tmp_path / "masks"
    everything.save(path)
    assert dropinf.Compressor.from_masks(path, frozen, loss_fn).digest() == everything.digest()
    trainable = peft.PeftModel.from_pretrained(Base(), tmp_path, is_trainable=True)
    assert len(dropinf.Compressor(trainable, dropinf.Dropout(2), loss_fn).layers) == 4
    plain = Base().requires_grad_(False)
    assert len(dropinf.Compressor(plain, dropinf.Dropout(2), loss_fn).layers) == 7


def test_the_active_one_of_several(tmp_path):
    saved(CONFIGS["lora"](), tmp_path / "a")
    saved(CONFIGS["lora"](), tmp_path / "b")
    model = peft.PeftModel.from_pretrained(Base(), tmp_path / "a", adapter_name="one")
    model.load_adapter(tmp_path / "b", adapter_name="two")
    for active in ("one", "two"):
        model.set_adapter(active)
        model.requires_grad_(False)
        with pytest.warns(UserWarning, match="adapter alone is tracked"):
            compressor = dropinf.Compressor(model, dropinf.Dropout(2), loss_fn)
        assert len(compressor.layers) == 4
        assert all(active in name for name in compressor.layers)


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.l = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.l(x * self.w)


@pytest.mark.parametrize("layers", ["w", "?", ["w"]])
def test_a_parameter_of_the_model_itself_is_picked_by_its_name(layers):
    assert "w" in dropinf.Compressor(Root(), dropinf.Identity(), lambda m, x: m(x).sum(1), layers=layers).layers
