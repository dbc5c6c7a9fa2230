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
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
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
    state = {k: v.detach().clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    grads = {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    modules = {
        n: (m.training, sorted(m.__dict__), [len(getattr(m, h)) for h in HOOKS], id(m.forward))
        for n, m in model.named_modules()
    }
    identities = [(id(p), type(p), sorted(p.__dict__)) for p in model.parameters()] + [id(b) for b in model.buffers()]
    switches = (
        torch.get_rng_state(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
    )
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
    assert torch.equal(before[4][0], after[4][0]), "random state"
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


class Fragile(nn.Module):
    """Fails where it is told to, for one batch. ``scale`` takes the exact route, the others are hooked."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.fails, self.marked = "", torch.zeros(0, 5)

    def forward(self, x):
        self.seen += 1 if self.training else 0
        h = self.first(x) * self.scale
        if self.fails and any(torch.equal(row, x[0]) for row in self.marked):
            if self.fails == "forward":
                raise KeyError("half way")
            if self.fails == "interrupt":
                raise KeyboardInterrupt
            if self.fails == "backward":
                h = Failing.apply(h)
            if self.fails == "nan":
                h = h * float("nan")
            if self.fails == "shape":
                self.second(h.unsqueeze(1).expand(-1, 2, -1).reshape(-1, 2, 2))
        return self.second(h)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(*_):
        raise KeyError("half way")


def squared(model, x):
    return model(x).square().sum(1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sketch", [dropinf.Dropout(2), dropinf.PCA(2)], ids=["dropout", "pca"])
@pytest.mark.parametrize("where", ["forward", "interrupt", "backward", "nan", "shape", "loader"])
def test_a_failure_in_the_second_batch_leaves_model_and_compressor_usable(where, sketch, training):
    model = Fragile().train(training)
    model.second.bias.requires_grad_(False)
    model.first.weight.grad = torch.randn(4, 5)
    data = [torch.randn(4, 5) for _ in range(3)]
    compressor = dropinf.Compressor(model, sketch, squared)
    compressor.calibrate(data)
    expected = compressor.compress(data).flat

    def loader():
        yield data[0]
        if where == "loader":
            raise KeyError("half way")
        yield from data[1:]

    model.fails, model.marked = where, data[1]
    before = snapshot(model)
    for sweep in (compressor.compress, dropinf.Compressor(model, sketch, squared).calibrate):
        if sweep != compressor.compress and sketch.statistics is None:
            continue
        with pytest.raises((KeyError, KeyboardInterrupt, ValueError, RuntimeError)):
            sweep(loader())
        assert_same(before, snapshot(model))
    model.fails = ""
    assert torch.equal(compressor.compress(data).flat, expected)


@pytest.mark.filterwarnings("ignore:model. it is in train mode")
def test_switches_that_are_off_stay_off():
    """Compression turns gradients on for itself, also where the caller has them off."""
    model, data = make_model(), batches()
    expected = dropinf.compress(model.eval(), data, loss_fn, dropinf.Dropout(3)).flat
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        before = snapshot(model)
        assert torch.equal(dropinf.compress(model, data, loss_fn, dropinf.Dropout(3)).flat, expected)
        assert_same(before, snapshot(model))


@pytest.mark.filterwarnings("ignore:model. it is in train mode")
@pytest.mark.parametrize("sketch", [*SKETCHES, dropinf.Dropout(3, mode="flat")], ids=lambda s: f"{s!r} {s.mode}")
@pytest.mark.parametrize("fails", [False, True])
def test_training_goes_on_with_the_same_bits(sketch, fails):
    def steps(model, data):
        torch.manual_seed(9)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for batch in data:
            loss_fn(model, batch).mean().backward()  # adds to the gradient that was there
            optimizer.step()
            optimizer.zero_grad()
        return snapshot(model)

    data = batches()
    plain, used = make_model(), make_model()
    if fails:
        bad = [*data, (data[0][0] * float("nan"), data[0][1])]
        with pytest.raises(ValueError, match="not finite"):
            dropinf.compress(used, bad, loss_fn, sketch)
    else:
        dropinf.compress(used, data, loss_fn, sketch)
    one, other = steps(plain, data), steps(used, data)
    for (name, a), b in zip(one[0].items(), other[0].values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(one[4][0], other[4][0])


@pytest.mark.parametrize(("verb", "sketch"), [("compress", dropinf.Dropout(2)), ("calibrate", dropinf.PCA(2))])
def test_an_iterator_that_ends_within_the_loss_is_an_error_of_its_own_class(verb, sketch):
    """StopIteration neither ends the batches nor becomes another error."""
    left = iter([1.0, 2.0])
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), batches()
    before = snapshot(model)
    with pytest.raises(StopIteration):
        getattr(dropinf.Compressor(model, sketch, lambda m, b: loss_fn(m, b) * next(left)), verb)(data)
    assert_same(before, snapshot(model))


class Counts(nn.Module):
    """Writes to its buffers in eval mode too."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(4, 3))

    def forward(self, x):
        self.calls += 1
        self.last.copy_(x)
        return self.a(x) * self.calls


def test_buffers_that_a_forward_writes_to_in_eval_mode_are_as_before():
    model, x = Counts().eval(), torch.randn(3, 4, 3)
    compressor = dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x).square().sum(1))
    rows = compressor.compress(list(x))["a"]
    assert model.calls.tolist() == [0]
    assert model.last.abs().sum() == 0
    first = torch.cat([compressor.compress([batch])["a"] for batch in x])
    torch.testing.assert_close(rows, first)  # every forward of every batch found the buffers as the first did
