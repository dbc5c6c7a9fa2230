"""Scripts, torch.func inside the loss and the model, batches in other layouts: right against the oracle, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf

from .oracle import assert_equal_gradients, oracle

pytestmark = [
    pytest.mark.filterwarnings("ignore:layers "),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
N = 4


def squared(model, x):
    out = model(x)
    return out.square().flatten(1).sum(1) + out.flatten(1).sum(1)


def mlp(last=nn.Tanh):
    return nn.Sequential(nn.Linear(5, 6), last(), nn.Linear(6, 3)).double().eval()


def inputs(n=N):
    return torch.randn(n, 5, dtype=torch.float64)


def assert_right(model, loss_fn, batch, n=N):
    compressor = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn)
    rows = compressor.compress([batch])
    assert_equal_gradients(compressor, rows, oracle(model, loss_fn, batch, n))
    return compressor


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.script(mlp()),
        lambda: torch.jit.trace(mlp(), inputs()),
        lambda: nn.Sequential(torch.jit.script(mlp()), nn.Linear(3, 2).double()),
        lambda: torch.jit.script(nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.BatchNorm1d(6)).double().eval()),
    ],
    ids=["script", "trace", "part", "batchnorm"],
)
def test_scripts(make):
    x = inputs()
    assert_right(make(), lambda m, b: squared(m, b), x if "Conv1d" not in str(make()) else x[:, None])


def test_scripts_that_are_refused():
    norm = torch.jit.script(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double())
    with pytest.raises(ValueError, match=r"BatchNorm '1' is in train mode.*call model\.eval\(\)"):
        dropinf.Compressor(norm, dropinf.Dropout(3), squared).compress([inputs()])
    frozen = torch.jit.freeze(torch.jit.script(mlp()))
    with pytest.raises(
        ValueError, match=r"model: nothing to track; it is a script without parameters \(torch.jit.freeze"
    ):
        dropinf.Compressor(frozen, dropinf.Dropout(3), squared)
    with pytest.raises(ValueError, match=r"layers: .*Linear.* matches no .*; '0' is one, scripted, .* pick it by name"):
        dropinf.Compressor(torch.jit.script(mlp()), dropinf.Dropout(3), squared, layers=nn.Linear)


class Inside(nn.Module):
    """A model whose forward transforms a part of it."""

    def __init__(self, how):
        super().__init__()
        self.part, self.how = mlp(), how

    def forward(self, x):
        return self.how(self.part, x)


def jvp(m, x):
    out, tangent = torch.func.jvp(m, (x,), (torch.ones_like(x),))
    return torch.cat([out, tangent], 1)


TRANSFORMS = {
    "vmap": lambda m, x: torch.vmap(m)(x),
    "grad": lambda m, x: torch.func.grad(lambda z: m(z).square().sum())(x),
    "vmap of grad": lambda m, x: torch.vmap(torch.func.grad(lambda z: m(z).square().sum()))(x),
    "jvp": jvp,
    "jacrev": lambda m, x: torch.vmap(torch.func.jacrev(m))(x),
    "jacfwd": lambda m, x: torch.vmap(torch.func.jacfwd(m))(x),
    "functional_call": lambda m, x: torch.func.functional_call(m, {n: p * 2 for n, p in m.named_parameters()}, (x,)),
}


@pytest.mark.parametrize("where", ["loss", "model"])
@pytest.mark.parametrize("how", TRANSFORMS)
def test_torch_func_inside(how, where):
    transform = TRANSFORMS[how]
    if where == "model":
        assert_right(Inside(transform), squared, inputs())
    else:
        assert_right(mlp(), lambda m, x: transform(m, x).square().flatten(1).sum(1), inputs())


def test_torch_func_around_is_refused():
    compressor = dropinf.Compressor(mlp(), dropinf.Dropout(3), squared)
    calibrated = dropinf.Compressor(mlp(), dropinf.PCA(2), squared)
    x, message = inputs(), r"compressor: it is called inside torch\.func .*must be called outside"
    with pytest.raises(ValueError, match=message):
        torch.vmap(lambda row: compressor.compress([row[None]]).flat)(x)
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda z: compressor.compress([z]).flat.sum())(x)
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(lambda z: calibrated.calibrate([z]), (x,), (x,))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"called under torch\.inference_mode"):
        compressor.compress([inputs()])
    with torch.no_grad():
        assert len(compressor.compress([x])) == N


def transformer():
    return nn.Transformer(8, 2, 1, 1, 16, dropout=0.0).double().eval()


def sequences(batch_first, n=N):
    pair = torch.randn(n, 3, 8, dtype=torch.float64), torch.randn(n, 2, 8, dtype=torch.float64)
    return pair if batch_first else tuple(x.transpose(0, 1).contiguous() for x in pair)


def transposed(model, batch):
    return model(*(x.transpose(0, 1) for x in batch)).square().sum((0, 2))


def test_time_first():
    """As nn.Transformer takes it: with the samples in the second dimension of every tensor, or transposed in the loss."""
    model, batch = transformer(), sequences(batch_first=True)
    expected = oracle(model, transposed, batch, N)
    compressor = assert_right(model, transposed, batch)
    timed = dropinf.Compressor(model, dropinf.Dropout(3), lambda m, b: m(*b).square().sum((0, 2)))
    turned = tuple(x.transpose(0, 1).contiguous() for x in batch)
    rows = timed.compress([turned, turned])
    assert_equal_gradients(timed, rows[:N], expected)
    assert_equal_gradients(timed, rows[N:], expected)
    assert timed.digest() == compressor.digest()


def test_time_first_of_ids():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body, self.head = nn.Embedding(7, 4), nn.GRU(4, 5), nn.Linear(5, 3)

        def forward(self, ids):
            return self.head(self.body(self.table(ids))[0])

    model, ids = Tagger().double().eval(), torch.randint(0, 7, (3, N))
    expected = oracle(model, lambda m, b: m(b.T).square().sum((0, 2)), ids.T, N)
    compressor = dropinf.Compressor(model, dropinf.Dropout(3), lambda m, b: m(b).square().sum((0, 2)))
    assert_equal_gradients(compressor, compressor.compress([ids]), expected)


def test_data_of_the_wrong_layout_names_batch_first():
    message = (
        r"losses of samples \d and \d .*MultiheadAttention 'encoder.layers.0.self_attn' has batch_first=False.*batch_f"
    )
    with pytest.raises(dropinf.AttributionError, match=message):
        dropinf.Compressor(transformer(), dropinf.Dropout(3), lambda m, b: m(*b).square().sum((1, 2))).compress(
            [(torch.randn(N, 3, 8, dtype=torch.float64), torch.randn(N, 3, 8, dtype=torch.float64))]
        )


def test_losses_of_classes_are_not_losses_of_samples():
    """They number as the second dimension of the batch does."""
    for x in (inputs()[:, :3], torch.randn(N, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"returned 3 losses .* leading sizes \[4\]"):
            dropinf.Compressor(
                nn.Linear(3, 3).double(), dropinf.Dropout(3), lambda m, b: (m(b) - b).square().sum(0)
            ).compress([x])


def cross_entropy(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def stacked(model, samples):
    if isinstance(samples[0], dict):
        samples = [(s["x"], s["y"]) for s in samples]
    return cross_entropy(model, (torch.stack([x for x, _ in samples]), torch.tensor([int(y) for _, y in samples])))


@pytest.mark.parametrize(
    "form", [tuple, list, lambda s: dict(zip("xy", s, strict=True))], ids=["tuple", "list", "dict"]
)
@pytest.mark.parametrize("label", [int, torch.tensor], ids=["int", "tensor"])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_lists_of_samples_that_the_loss_handles(form, label, n):
    model, x, y = mlp(), inputs(n), torch.randint(0, 3, (n,))
    compressor = dropinf.Compressor(model, dropinf.Dropout(3), stacked)
    samples = [form((x[i], label(int(y[i])))) for i in range(n)]
    rows = compressor.compress([samples, samples])
    expected = oracle(model, cross_entropy, (x, y), n)
    assert_equal_gradients(compressor, rows[:n], expected)
    assert_equal_gradients(compressor, rows[n:], expected)


@pytest.mark.parametrize("lengths", [(2, 3, 1, 6), (3, 3)])
def test_lists_of_sequences(lengths):
    def loss_fn(m, batch):
        return torch.stack([m(s).square().sum() for s in batch])

    model = mlp()
    samples = [torch.randn(n, 5, dtype=torch.float64) for n in lengths]
    expected = []
    for s in samples:
        loss_fn(model, [s]).sum().backward()
        expected.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    compressor = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn)
    rows = compressor.compress([samples])
    assert_equal_gradients(compressor, rows, {n: torch.stack([e[n] for e in expected]) for n in expected[0]})


@pytest.mark.parametrize("n", [2, 4])
def test_lists_of_samples_that_the_loss_does_not_handle(n):
    pairs = [(x, y) for x, y in zip(inputs(n), torch.randint(0, 3, (n,)), strict=True)]
    with pytest.raises(
        (TypeError, ValueError),
        match=rf"batch: it is a list of {n} samples, each a tuple, .* not collated; .* raised .*Error: .*DataLoader",
    ):
        dropinf.Compressor(mlp(), dropinf.Dropout(3), cross_entropy).compress([pairs])
    data = torch.utils.data.TensorDataset(inputs(), torch.randint(0, 3, (N,)))
    for batches in (data, [data[0], data[1]], [(inputs()[0], 2)]):
        with pytest.raises((TypeError, ValueError), match=r"is the batch a single sample|has a number .*single sample"):
            dropinf.Compressor(mlp(), dropinf.Dropout(3), cross_entropy).compress(batches)


class Graph(nn.Module):
    """Sends each node's features along the edges, and sums each graph's nodes."""

    def __init__(self):
        super().__init__()
        self.nodes, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x, edges, graph):
        h = self.nodes(x)
        h = torch.tanh(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        return self.head(h.new_zeros(int(graph.max()) + 1, 6).index_add(0, graph, h))


def graphs(sizes):
    edges, start = [], 0
    for n in sizes:
        edges += [(start + i, start + (i + 1) % n) for i in range(n)]
        start += n
    x = torch.randn(start, 5, dtype=torch.float64)
    return x, torch.tensor(edges).T, torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def test_graphs_as_tuples():
    model, sizes = Graph().double().eval(), [2, 3, 4]

    def loss_fn(m, batch):
        return m(*batch[:3]).square().sum(1)

    x, edges, graph = graphs(sizes)
    with pytest.raises(
        ValueError, match=r"3 losses .* sizes \[2, 9\].*nodes of graphs.* pass cu_seqlens=.*int \[N \+ 1\]"
    ):
        dropinf.Compressor(model, dropinf.Dropout(3), loss_fn).compress([(x, edges, graph)])
    starts = torch.tensor([0, 2, 5, 9])
    expected = []
    for i, n in enumerate(sizes):
        one = (x[starts[i] : starts[i + 1]], graphs([n])[1], torch.zeros(n, dtype=torch.int64))
        loss_fn(model, one).sum().backward()
        expected.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    expected = {name: torch.stack([e[name] for e in expected]) for name in expected[0]}
    cut = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn, cu_seqlens=lambda _: starts.int())
    assert_equal_gradients(cut, cut.compress([(x, edges, graph)]), expected)
    labelled = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn)
    assert_equal_gradients(labelled, labelled.compress([(x, edges, graph, torch.zeros(3))]), expected)
