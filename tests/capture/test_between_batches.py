"""What happens between the batches of a call, and what the calls of one module in a batch add up to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dropinf
from tests.capture.right_or_refused import doubles  # noqa: F401


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.l = nn.Conv1d(2, 3, 2), nn.GroupNorm(1, 3), nn.Linear(9, 2)
        self.table, self.scale = nn.Embedding(5, 8), 1.0

    def forward(self, ids):
        return self.l(self.norm(self.conv(self.table(ids).view(-1, 2, 4))).flatten(1)) / self.scale


SETTINGS = {
    "a number of its own": lambda m: setattr(m, "scale", 2.0),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "stride": lambda m: setattr(m.conv, "dilation", (2,)) or setattr(m.conv, "padding", (1,)),
    "padding_idx": lambda m: setattr(m.table, "padding_idx", 2),
    "mode": lambda m: m.norm.train(not m.norm.training),
    "a new attribute": lambda m: setattr(m, "extra", 1),
    "another module": lambda m: setattr(m, "l", nn.Linear(9, 2)),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_what_is_set_between_batches_is_refused(what):
    model, data = Net().eval(), list(torch.randint(5, (4, 3, 1)))

    def batches():
        yield from data[:2]
        SETTINGS[what](model)
        yield from data[2:]

    compressor = dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x).square().sum(1))
    with pytest.raises(ValueError, match=r"was (set|replaced) between two batches of a call"):
        compressor.compress(batches())


def twice(m, batch):
    return (m(batch[0]).tanh() - m(batch[1]).tanh()).square().flatten(1).sum(1)


MODELS = {
    "linear": (lambda: nn.Linear(4, 6), "bias"),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), "1"),
    "norm_bias": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), "1.bias"),
    "conv": (lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2)), "1.bias"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_vector_s_moments_are_of_its_gradient_and_not_of_each_call(name):
    torch.manual_seed(0)
    make, layer = MODELS[name]
    model, x = make(), torch.randn(20, 4)
    batch = (x, x + 0.05 * torch.randn(20, 4))
    parameter = dict(model.named_parameters())[layer if layer.endswith("bias") else f"{layer}.weight"]
    rows = [torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in twice(model, batch)]
    want = torch.stack(rows).T @ torch.stack(rows) / 20
    compressor = dropinf.Compressor(model, dropinf.PCA(2), twice)
    compressor.calibrate([batch])
    torch.testing.assert_close(compressor._moments.of(layer)["out"], want)


def halved(model, x):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.5)


def trained(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(0.01 * p.grad)
    model.zero_grad()


def by_a_copy(model, x):
    copied = copy.deepcopy(model)
    trained(copied, x)
    model.load_state_dict(copied.state_dict())


def frozen_for_a_while(model, x):
    trained(model, x)
    first = next(model.parameters())
    first.requires_grad_(not first.requires_grad)


def test_a_hook_on_a_weight_between_two_calls_is_no_fault_of_the_first():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    compressor = dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x).square().sum(1))
    before = compressor.compress([x, x])["0"]
    handle = model[0].weight.register_hook(lambda g: 2 * g)
    torch.testing.assert_close(compressor.compress([x, x])["0"], 2 * before)
    handle.remove()
    torch.testing.assert_close(compressor.compress([x, x])["0"], before)


@pytest.mark.parametrize("step", [halved, trained, by_a_copy, frozen_for_a_while])
@pytest.mark.parametrize("options", [{}, {"route": {"*": "alone"}}, {"audit": "every"}, {"layers": ["0"]}], ids=str)
def test_a_model_that_is_trained_between_batches(step, options):
    """The code that makes batches finds the model as its user left it, hooked though it is."""
    rows = []
    for compressed in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

        def batches(model=model):
            for n in (4, 4, 3, 4, 4):
                x = torch.randn(n, 3)
                yield x
                step(model, x)

        def loss(m, x):
            return m(x).square().sum(1)

        if compressed:
            rows.append(dropinf.Compressor(model, dropinf.Identity(), loss, **options).compress(batches())["0"])
        else:
            w = model[0].weight
            one = []
            for x in batches():
                flag = w.requires_grad
                w.requires_grad_()
                one += [torch.autograd.grad(losses, w, retain_graph=True)[0] for losses in loss(model, x)]
                w.requires_grad_(flag)
            rows.append(torch.stack(one))
    torch.testing.assert_close(*rows)


def rows_of(model, loss, batches, name):
    weight = dict(model.named_parameters())[name]
    return [torch.autograd.grad(one, weight, retain_graph=True)[0].flatten() for x in batches for one in loss(model, x)]


def squared(m, x):
    return m(x).flatten(1).sum(1) ** 2


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 1)).eval()


@pytest.mark.parametrize("last", [True, False])
def test_statistics_that_are_written_between_batches_stay(last):
    """As where checkpoints are loaded one after another, and the last answers a query."""
    model, xs = normed(), [torch.randn(4, 3, 8) for _ in range(3)]
    checkpoints = [
        {k: v + 0.3 * torch.rand(v.shape) if v.is_floating_point() else v + 7 for k, v in model.state_dict().items()}
        for _ in range(3)
    ]
    want = []

    def batches():
        for checkpoint in checkpoints[: 2 if last else 3]:
            model.load_state_dict(checkpoint)
            yield from xs[:2]
        model.load_state_dict(checkpoints[2])

    for checkpoint in checkpoints[: 2 if last else 3]:
        model.load_state_dict(checkpoint)
        want += rows_of(model, squared, xs[:2], "0.weight")
    compressor = dropinf.Compressor(model, dropinf.Identity(), squared)
    torch.testing.assert_close(compressor.compress(batches())["0"].flatten(1), torch.stack(want))
    assert all(torch.equal(v, checkpoints[2][k]) for k, v in model.state_dict().items())
    query = compressor.compress([xs[2]])["0"].flatten(1)
    torch.testing.assert_close(query, torch.stack(rows_of(model, squared, [xs[2]], "0.weight")))


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n, self.l = nn.Conv1d(3, 4, 3, bias=False), nn.InstanceNorm1d(4), nn.Linear(24, 1)
        self.register_buffer("mean", torch.zeros(3, 1))

    def forward(self, x):
        return self.l(torch.tanh(self.n(self.c(torch.tanh(x - self.mean)))).flatten(1))


WRITES = {
    "data": lambda m, x: m.mean.data.copy_(x),
    "numpy": lambda m, x: m.mean.numpy().__setitem__(slice(None), x.numpy()),
    "swapped": lambda m, x: setattr(m.mean, "data", x.clone()),
}


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("write", WRITES)
def test_a_buffer_that_is_written_without_a_trace_stays(write, before):
    torch.manual_seed(0)
    model, xs = Centred().eval(), [torch.randn(4, 3, 8) for _ in range(6)]
    compressor = dropinf.Compressor(model, dropinf.Identity(), squared)
    compressor.compress(xs[:2])
    want = rows_of(model, squared, xs[:before], "c.weight")

    def batches():
        yield from xs[:before]
        WRITES[write](model, torch.tensor([[1.0], [2.0], [-1.0]]).double())
        yield from xs[before:]

    found = compressor.compress(batches())["c"].flatten(1)
    assert model.mean.flatten().tolist() == [1.0, 2.0, -1.0]
    torch.testing.assert_close(found, torch.stack(want + rows_of(model, squared, xs[before:], "c.weight")))


def test_buffers_are_put_back_where_a_batch_fails():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, momentum=0.5), nn.Flatten(), nn.Linear(24, 1))
    model.eval()

    def loss(m, x):
        m[1].running_mean.add_(1)
        if len(x) == 3:
            raise RuntimeError("this batch fails")
        return squared(m, x)

    with pytest.raises(RuntimeError, match="this batch fails"):
        dropinf.Compressor(model, dropinf.Identity(), loss).compress([torch.randn(n, 3, 8) for n in (4, 4, 3)])
    assert not model[1].running_mean.any()


def test_a_batch_that_is_written_through_numpy_is_refused_and_put_back():
    model, batches = nn.Linear(3, 2), [(torch.randn(4, 3), factor) for factor in (1.0, 1.0, 0.5)]
    before = [x.clone() for x, _ in batches]

    def loss(m, batch):
        x, factor = batch
        view = x.numpy()
        out = m(x)
        view *= factor
        return out.square().sum(1)

    rows = dropinf.Compressor(model, dropinf.Identity(), loss).compress(batches[:2])
    assert len(rows) == 8
    with pytest.raises(ValueError, match="it writes to the batch through NumPy"):
        dropinf.Compressor(model, dropinf.Identity(), loss).compress(batches)
    assert all(torch.equal(x, was) for (x, _), was in zip(batches, before, strict=True))


@pytest.mark.parametrize("audit", ["auto", "every"])
@pytest.mark.parametrize("held", [None, 3.0])
def test_leaves_of_the_batch_and_of_attributes_keep_their_grad(held, audit):
    model = nn.Linear(3, 2)
    model.scale, model.held = torch.ones(2, requires_grad=True), [torch.zeros(2, requires_grad=True)]
    x = torch.randn(4, 3, requires_grad=True)
    leaves = x, model.scale, model.held[0], model.weight
    for leaf in leaves:
        leaf.grad = None if held is None else torch.full_like(leaf, held)
    grads = [leaf.grad for leaf in leaves]

    def loss(m, x):
        return (m(x) * m.scale + m.held[0]).square().sum(1)

    dropinf.Compressor(model, dropinf.Identity(), loss, audit=audit).compress([x, x])
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf.grad is grad
        assert grad is None or bool((grad == held).all())
