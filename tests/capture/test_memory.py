"""Peak memory over a plain forward + input-gradient backward: the compressed gradients and gathered inputs, no more."""

from __future__ import annotations

import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dropinf
from dropinf.capture import run
from dropinf.capture.modules import LinearUse

N, T, D, LAYERS, VOCABULARY, DIM = 4, 64, 64, 4, 96, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm2, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, D), nn.Embedding(T, D)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, VOCABULARY, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(torch.arange(T).expand_as(ids)))))


def loss_fn(model, ids):
    return F.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none").sum(1)


class Live(TorchDispatchMode):
    """Bytes of the storages that were made inside and are alive; ``peak`` is their maximum."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._note(t.untyped_storage(), given)
        return out

    def _note(self, storage, given):
        key = storage._cdata
        if key in self.known or key in given:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self.known.discard(key)
        self.live -= size


def peak(function):
    with Live() as live, mock.patch.object(run, "own_modes", return_value=False):  # this one changes nothing
        function()
    return live.peak


def plain(model, ids):
    """The floor: a forward, and a backward to the embedding's output, with frozen weights."""
    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    handle = model.tokens.register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    loss_fn(model, ids).sum().backward()
    handle.remove()
    for p, flag in zip(model.parameters(), flags, strict=True):
        p.requires_grad_(flag)


def added(keeps_full_inputs: bool = False, monkeypatch=None) -> tuple[int, int, int]:
    """(bytes that compression adds to the peak, compressed gradients and gathered inputs, the layers' full inputs)."""
    torch.manual_seed(0)
    model, ids = GPT().eval(), torch.randint(0, VOCABULARY, (N, T))
    compressor = dropinf.Compressor(model, dropinf.Dropout(DIM), loss_fn)
    compressor.compress([ids])  # the check of the first batch is done
    if keeps_full_inputs:
        kept = []

        def save(self, x, out):
            kept.append(x.clone())
            return self.inputs(self.weight.in_axis.apply(x), out)

        monkeypatch.setattr(LinearUse, "save", save)
    gradients = compressor.compress([ids]) if not keeps_full_inputs else None
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    gathered = 4 * N * T * DIM * (len(linears) + len(norms))
    stored = 0 if gradients is None else gradients.flat.nbytes
    full = 4 * N * T * sum(m.in_features for m in linears)
    return peak(lambda: compressor.compress([ids])) - peak(lambda: plain(model, ids)), stored + gathered, full


@pytest.fixture(scope="module")
def honest():
    return added()


def test_peak_grows_by_what_is_kept(honest):
    extra, allowed, full = honest
    assert allowed < full / 2, "the test could not tell"
    assert extra <= allowed


def test_the_measurement_sees_full_inputs(honest, monkeypatch):
    extra, _, full = added(True, monkeypatch)
    assert extra >= 0.9 * full
    assert extra > honest[1], "the bound would not fail"


@pytest.mark.parametrize("kept", ["the input", "a copy"])
def test_full_inputs_kept_by_the_graph_break_the_bound(kept, honest, monkeypatch):
    """Those are freed layer by layer in backward; the peak shows them nevertheless."""

    def save(self, x, out):
        small = self.inputs(self.weight.in_axis.apply(x), out)
        small.kept = x if kept == "the input" else x.clone()
        return small

    monkeypatch.setattr(LinearUse, "save", save)
    assert added()[0] > honest[1]


def test_peak_does_not_grow_with_the_number_of_batches():
    """But for the gradients: of all batches, and once more of the last."""
    torch.manual_seed(0)
    model, batches = GPT().eval(), [torch.randint(0, VOCABULARY, (N, T)) for _ in range(3)]
    compressor = dropinf.Compressor(model, dropinf.Dropout(DIM), loss_fn)
    per_batch = compressor.compress(batches[:1]).flat.nbytes
    one = peak(lambda: compressor.compress(batches[:1]))
    three = peak(lambda: compressor.compress(batches))
    assert three - one <= 4 * per_batch


def test_the_measurement_is_exact():
    def work():
        a = torch.ones(1000)  # 4000 bytes
        b = a + 1
        del a
        c = b.view(10, 100) * 2  # b and c
        b.add_(1)
        del b
        (c + 1).sum()  # c, its sum with 1, and 4 bytes

    assert peak(work) == 8004


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_no_weight_gradient_exists(name):
    """Nothing of the size of a weight's per-sample gradient, or of its gradient, is ever made."""
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 5))
    options = {"layers": f"*.{name}", "audit": "never"}  # an audit is one ordinary backward
    compressor = dropinf.Compressor(model, dropinf.Dropout(4), lambda m, x: m(x).square().sum(1), **options)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    with Largest():
        compressor.compress([torch.randn(3, 300)])
    assert largest <= 3 * 300
