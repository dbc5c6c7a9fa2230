"""nn.MultiheadAttention, whose weights no module of their own uses: right, and captured at the ops inside."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf.capture.op_calls import OpCall
from tests.capture.right_or_refused import Cases, built, check, doubles, runs, squares  # noqa: F401

CASES = Cases()
SIZES = (4, 4, 5, 3, 1)
D, T = 4, 6


class Attention(nn.Module):
    """A layer, attention called as ``call`` says, and a layer: x [N, T, 3]."""

    def __init__(self, call, **options):
        super().__init__()
        self.a, self.b = nn.Linear(3, D), nn.Linear(D, 2)
        self.attention, self.call = nn.MultiheadAttention(D, 2, **({"batch_first": True} | options)), call

    def forward(self, x):
        return self.b(self.call(self.attention, torch.tanh(self.a(x))))


def itself(m, x, **options):
    return m(x, x, x, need_weights=False, **options)[0]


def time_first(m, x, **options):
    x = x.transpose(0, 1)
    return m(x, x, x, **options)[0].transpose(0, 1)


def with_weights(m, x, **options):
    out, weights = m(x, x, x, **options)
    return out + weights.sum((-1, -2) if weights.ndim == 3 else (1, 2, 3))[:, None, None]


CAUSAL = torch.ones(T, T).triu(1).bool()
KINDS = {
    "itself": (itself, {}),
    "time_first": (time_first, {"batch_first": False}),
    "without_biases": (itself, {"bias": False}),
    "weights": (with_weights, {}),
    "weights_of_each_head": (lambda m, x: with_weights(m, x, average_attn_weights=False), {}),
    "causal": (lambda m, x: itself(m, x, attn_mask=CAUSAL, is_causal=True), {}),
    "masked": (lambda m, x: itself(m, x, attn_mask=CAUSAL.double() * -3), {}),
    "padded": (lambda m, x: itself(m, x, key_padding_mask=torch.arange(T).expand(len(x), T) > 3), {}),
    "padded_as_the_data_say": (lambda m, x: itself(m, x, key_padding_mask=F.pad(x[:, 1:, 0] > 0.4, (1, 0))), {}),
    "of_others": (lambda m, x: m(x, x.flip(1)[:, :4].contiguous() * 2, x[:, :4] + 1)[0], {}),
    "of_a_memory": (lambda m, x: (lambda memory: m(x, memory, memory)[0])(x.cumsum(1)), {}),
    "of_other_sizes": (lambda m, x: m(x, x[..., :3], x[..., :2])[0], {"kdim": 3, "vdim": 2}),
    "with_zeros": (itself, {"add_zero_attn": True}),
    "with_biases_of_keys": (itself, {"add_bias_kv": True}),
    "twice": (lambda m, x: itself(m, torch.tanh(itself(m, x))), {}),
}
for name, (call, options) in KINDS.items():

    def of(call=call, options=options):
        return Attention(call, **options), squares, [torch.randn(n, T, 3) for n in SIZES]

    of.__name__ = name
    CASES.add()(of)


@CASES.add()
def of_one_sample_each():
    """Without a dimension for samples, in a loop."""

    def each(m, x):
        return torch.stack([m(one, one, one)[0] for one in x])

    return Attention(each), squares, [torch.randn(n, T, 3) for n in (3, 3, 2)]


@CASES.add()
def encoder_and_decoder():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.of = nn.Transformer(D, 2, 1, 1, 6, 0.0, batch_first=True)
            self.a, self.b = nn.Linear(3, D), nn.Linear(D, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b(self.of(x, x[:, :4], tgt_mask=CAUSAL[:4, :4], tgt_is_causal=True))

    return Whole().eval(), squares, [torch.randn(n, T, 3) for n in SIZES]


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "with_biases_of_keys"])
def test_captured_at_the_ops_inside(name, monkeypatch):
    """No whole gradient is formed, and no sample is taken by itself."""
    call, options = KINDS[name]
    model, loss_fn, batches = built(lambda: (Attention(call, **options), squares, [torch.randn(4, T, 3)] * 3))
    whole = []
    monkeypatch.setattr(OpCall, "_by_samples", lambda *args: whole.append(args) or [])
    with warnings.catch_warnings(record=True) as slower:
        warnings.simplefilter("always")
        compressor = dropinf.Compressor(model, dropinf.Dropout(2), loss_fn)
        compressor.compress(batches)
    assert not whole
    assert not [str(w.message) for w in slower]
    assert len(compressor.audits) == 1


def test_adapters_of_attention():
    """PEFT makes the frozen weights anew as the modules are listed."""
    model = Attention(itself).double()
    config = peft.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False)
    model, x = peft.get_peft_model(model, config), [torch.randn(n, T, 3).double() for n in SIZES]
    rows = dropinf.Compressor(model, dropinf.Identity(), squares).compress(x)
    assert len(rows.shapes) == 4
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            one = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for xs in x for loss in squares(model, xs)]
            torch.testing.assert_close(rows[name.removesuffix(".weight")], torch.stack(one))
