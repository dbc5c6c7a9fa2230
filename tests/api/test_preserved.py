"""After compression the model is bit for bit and flag for flag what it was, also when something fails half way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_always_called",
)


def make_model():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4).eval(), nn.ReLU(inplace=True), nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8)), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 3),
    )  # fmt: skip
    model[6].requires_grad_(False)
    model[7].weight.grad = torch.randn(3, 8)
    model[0].register_forward_hook(lambda *_: None)
    model[1].eval()
    return model


def batches():
    torch.manual_seed(4)
    return [(torch.randn(5, 1, 4, 4), torch.randint(0, 3, (5,))) for _ in range(3)]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def snapshot(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    modules = {
        n: (m.training, sorted(m.__dict__), [len(getattr(m, h)) for h in HOOKS], id(m.forward))
        for n, m in model.named_modules()
    }
    identities = [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()]
    switches = (torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled())
    return state, grads, modules, identities, switches


def assert_same(before, after):
    for old, new in zip(before[0].items(), after[0].items(), strict=True):
        assert old[0] == new[0]
        assert torch.equal(old[1], new[1]), old[0]
    for name, (flag, grad) in before[1].items():
        assert after[1][name][0] == flag, name
        now = after[1][name][1]
        assert (grad is None) == (now is None), name
        assert grad is None or torch.equal(grad, now), name
    assert [m[:3] for m in before[2].values()] == [m[:3] for m in after[2].values()]
    assert before[3] == after[3]
    assert torch.equal(before[4][0], after[4][0])
    assert before[4][1:] == after[4][1:]


SKETCHES = [dropinf.Dropout(3), dropinf.Identity(), dropinf.PCA(2)]


@pytest.mark.filterwarnings("ignore:model. it is in train mode")
@pytest.mark.parametrize("sketch", SKETCHES, ids=repr)
@pytest.mark.parametrize("fast_path", [True, False])
def test_model_is_untouched(sketch, fast_path):
    model, data = make_model(), batches()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        before = snapshot(model)
        dropinf.compress(model, data, loss_fn, sketch)
        assert_same(before, snapshot(model))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.filterwarnings("ignore:model. it is in train mode")
@pytest.mark.parametrize("failure", ["before", "after", "nan", "scalar"])
def test_model_is_untouched_after_a_failure(failure):
    model, data = make_model(), batches()
    calls = 0

    def failing(model, batch):
        nonlocal calls
        calls += 1
        if calls >= 4 and failure == "before":
            raise KeyError("half way")
        losses = loss_fn(model, batch)
        if calls >= 4 and failure == "after":
            raise KeyError("half way")
        if calls >= 4 and failure == "nan":
            return losses * float("nan")
        return losses.sum() if calls >= 4 and failure == "scalar" else losses

    before = snapshot(model)
    with pytest.raises((KeyError, ValueError)):
        dropinf.compress(model, data * 3, failing, dropinf.Dropout(3))
    assert calls >= 4
    assert_same(before, snapshot(model))


@pytest.mark.filterwarnings("ignore:model. it is in train mode")
def test_training_goes_on_with_the_same_bits():
    def step(model, data):
        torch.manual_seed(9)
        model.zero_grad()
        loss_fn(model, data[0]).mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        return model.state_dict()

    data = batches()
    plain, used = make_model(), make_model()
    dropinf.compress(used, data, loss_fn, dropinf.Dropout(3))
    for (name, a), b in zip(step(plain, data).items(), step(used, data).values(), strict=True):
        assert torch.equal(a, b), name
