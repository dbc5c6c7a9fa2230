"""Labels of samples: for every op of PyTorch's own list, an entry's label names all that autograd says it depends on."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

from dropinf.capture.colours import NONE, SEVERAL
from dropinf.capture.dependence import Dependence, stay_apart
from dropinf.capture.labels import Labels

# Of a tensor that is a view in the sample; of eigenvectors, which have no gradient of their own.
LEFT_OUT = {"as_strided", "linalg.eig"}
OPS = [
    op
    for op in op_db
    if op.supports_autograd and torch.float64 in op.supported_dtypes("cpu") and op.name not in LEFT_OUT
]
# Every sixth of them in `make test`.
SOME = [op if i % 6 == 0 else pytest.param(op, marks=pytest.mark.more) for i, op in enumerate(OPS)]
SPARSE = {"to_sparse", "sparse.sampled_addmm", "sparse.mm"}  # a forward with such ops is not followed at all
SAMPLES, ENTRIES, MOST = 4, 12, 2000


def copied(x: Any) -> Any:
    strided = isinstance(x, Tensor) and x.layout == torch.strided
    return x.detach().clone().requires_grad_(x.requires_grad) if strided else x


def labels_for(x: Tensor, draw: random.Random) -> Tensor:
    """One sample for each entry along some dimension, or any for each entry."""
    if x.ndim and draw.random() < 0.7:
        dim = draw.randrange(x.ndim)
        labels = torch.arange(x.shape[dim]).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
        return labels.expand(x.shape).to(torch.int32).clone()
    return torch.tensor([draw.randrange(-1, 3) for _ in range(x.numel())], dtype=torch.int32).reshape(x.shape)


def depends_on(entry: Tensor, given: list[tuple[Tensor, Tensor]]) -> set[int]:
    """The labels of all numbers that an entry has a gradient for."""
    gradients = torch.autograd.grad(entry, [x for x, _ in given], retain_graph=True, allow_unused=True)
    found: set[int] = set()
    for g, (_, labels) in zip(gradients, given, strict=True):
        if g is not None:
            found |= set(labels[(g.to_dense() if g.is_sparse else g).nan_to_num() != 0].tolist())
    return found - {NONE}


def followed(op: Any, inputs: Any, given: list[tuple[Tensor, Tensor]]) -> tuple[Dependence, Any]:
    with Dependence([], given) as dependence:
        out = op.op(inputs[0], *inputs[1], **inputs[2])
    return dependence, out


@pytest.mark.parametrize("op", SOME, ids=lambda op: op.formatted_name)
def test_labels_name_all_that_an_entry_depends_on(op):
    torch.manual_seed(0)
    draw = random.Random(op.formatted_name)
    samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    draw.shuffle(samples)
    for sample in samples[:SAMPLES]:
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        leaves = [copied(x) for x in leaves]
        tensors = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad and x.layout == torch.strided]
        if not tensors or any(x.numel() > MOST for x in tensors):
            continue
        given = [(x, labels_for(x, draw)) for x in tensors]
        dependence, out = followed(op, tree_unflatten(leaves, spec), given)
        if dependence.failure is not None:
            assert op.name in SPARSE, dependence.failure
            continue
        for result in tree_flatten(out)[0]:
            if isinstance(result, Tensor) and result.requires_grad and result.layout == torch.strided:
                check_entries(dependence, result, given, draw)


def check_entries(
    dependence: Dependence, result: Tensor, given: list[tuple[Tensor, Tensor]], draw: random.Random
) -> None:
    found = dependence.known.of(result)
    labels = torch.full(result.shape, NONE) if found is None else found
    result = result.abs() if result.is_complex() else result
    for i in draw.sample(range(result.numel()), min(ENTRIES, result.numel())):
        got = int(labels.flatten()[i])
        want = depends_on(result.flatten()[i], given)
        assert not want or got == SEVERAL or want == {got}


X = torch.arange(24.0).reshape(4, 6)
MOVED = {
    "index": lambda x, i: x[i],
    "index_of_columns": lambda x, i: x[:, i],
    "index_of_both": lambda x, i: x[torch.arange(4), i],
    "index_select": lambda x, i: x.index_select(0, i),
    "gather": lambda x, i: x.gather(0, i[:, None].expand(4, 6)),
    "scatter": lambda x, i: torch.zeros(4, 6).scatter(0, i[:, None].expand(4, 6), x),
    "index_add": lambda x, i: torch.zeros(4, 6).index_add(0, i, x),
    "index_copy": lambda x, i: torch.zeros(4, 6).index_copy(0, i, x),
    "index_put": lambda x, i: torch.zeros(4, 6).index_put((i,), x),
    "masked": lambda x, i: torch.where((i > 1)[:, None], x, x.flip(0)),
    "masked_fill": lambda x, i: x.masked_fill((i > 1)[:, None], 0),
    "product": lambda x, i: torch.nn.functional.one_hot(i, 4).to(x) @ x,
    "spread": lambda x, i: (torch.nn.functional.one_hot(i, 4).to(x)[..., None] * x).sum(1),
    "hinge": lambda x, i: (x - x.mean(0) - i[:, None] * 1000).relu(),
    "embedding": lambda x, i: torch.nn.functional.embedding(i, x),
}
APART = {"index_of_columns", "index_of_both", "masked_fill"}


@pytest.mark.parametrize("name", MOVED)
def test_labels_are_the_same_for_all_data(name):
    found = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 1, 1, 1]):
        x, index = X.clone().requires_grad_(), torch.tensor(order)
        with Dependence([], [(x, torch.arange(4)[:, None]), (index, torch.arange(4))]) as dependence:
            out = MOVED[name](x, index)
        assert dependence.failure is None
        found.append(dependence.known.of(out).clone())
    assert all(torch.equal(labels, found[0]) for labels in found)
    assert bool((found[0].reshape(4, -1) == torch.arange(4)[:, None]).all()) == (name in APART)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def images() -> nn.Module:
    norms = nn.GroupNorm(2, 8), nn.BatchNorm2d(8).eval()
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norms[0], nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=4), norms[1], nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip


def own(h: Tensor) -> Tensor:
    return h.flatten(1).square().sum(1)


N = 4
ROWS, LENGTHS = torch.randn(9, 6), [2, 3, 3, 1]
DATA = torch.randn(50, 6)
MODELS: dict[str, tuple[Any, Any, Any, bool]] = {
    "linear": (two_layers, lambda m, x: own(m(x)), torch.randn(N, 6), True),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval(), lambda m, x: own(m(x)), torch.randn(N, 5, 6), True),
    "time_first": (lambda: nn.GRU(6, 3), lambda m, x: own(m(x.transpose(0, 1))[0].transpose(0, 1)), torch.randn(N, 5, 6), True),
    "lstm": (lambda: nn.LSTM(6, 3, batch_first=True), lambda m, x: own(m(x)[0]), torch.randn(N, 5, 6), True),
    "images": (images, lambda m, x: own(m(x)), torch.randn(N, 3, 12, 12), True),
    "last_position": (two_layers, lambda m, b: own(m(b[0])[torch.arange(N), b[1]]), (torch.randn(N, 5, 6), torch.tensor([4, 2, 0, 1])), True),
    "rows_of_a_table": (two_layers, lambda m, i: own(m(DATA[i])), torch.tensor([3, 1, 4, 2]), True),
    "a_slice_of_the_data": (two_layers, lambda m, x: own(m(x)), DATA[8:12], True),
    "pairs": (two_layers, lambda m, x: own(m(x)).view(2, -1).diff(dim=0)[0], torch.randn(2 * N, 6), True),
    "a_list": (two_layers, lambda m, b: torch.stack([own(m(x[None]))[0] * y for x, y in b]), [(torch.randn(6), torch.rand(())) for _ in range(N)], True),
    "written_in_place": (two_layers, lambda m, x: own(torch.zeros(N, 5).index_copy_(1, torch.arange(3), m(x))), torch.randn(N, 6), True),
    "einsum": (two_layers, lambda m, x: torch.einsum("nd,nd->n", m(x), m(x)), torch.randn(N, 6), True),
    "without_gradient_across": (two_layers, lambda m, x: own(m(x)) * own(m(x)).mean().detach(), torch.randn(N, 6), True),
    "sorted": (two_layers, lambda m, x: own(m(x)[x[:, 0].argsort()]), torch.randn(N, 6), False),
    "contrastive": (two_layers, lambda m, x: (m(x) @ m(x).t()).softmax(1).diagonal(), torch.randn(N, 6), False),
    "foreach": (two_layers, lambda m, x: (lambda h: (torch._foreach_add_([h], [m(x).mean(0)]), own(h))[1])(m(x) * 1), torch.randn(N, 6), False),
    "filled": (two_layers, lambda m, x: (lambda h: (h[:, 0].fill_(m(x).mean()), own(h))[1])(m(x) * 1), torch.randn(N, 6), False),
    "numbers_that_leave": (two_layers, lambda m, x: own(m(x)) * x.sum().item(), torch.randn(N, 6), False),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_whose_samples_stay_apart(name):
    build, loss, batch, apart = MODELS[name]
    model = build()
    loss(model, batch)  # lazy layers
    assert stay_apart(model, lambda: loss(model, batch), batch, N, None) == apart


def test_documents_that_are_cut_apart():
    model, ends = two_layers(), torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)

    def cut() -> Tensor:
        return torch.stack([own(h).sum() for h in model(ROWS).split(LENGTHS)])

    assert stay_apart(model, cut, ROWS, N, ends)
    assert not stay_apart(model, lambda: cut() + model(ROWS).mean(), ROWS, N, ends)


def test_views_of_a_storage_share_their_labels():
    known, x = Labels(), torch.zeros(4, 6)
    known.put(x, torch.arange(4)[:, None], fixed=False)
    assert known.of(x.t()).tolist() == torch.arange(4).expand(6, 4).tolist()
    assert known.of(x[1:, ::2]).tolist() == [[n] * 3 for n in (1, 2, 3)]
    assert known.of(x.view(2, 2, 6)[:, 1, 0]).tolist() == [1, 3]
    known.put(x[:, 2], torch.tensor(SEVERAL), fixed=False)
    assert known.of(x).tolist() == [[n, n, SEVERAL, n, n, n] for n in range(4)]
    assert known.of(x.view(torch.float64)).unique().tolist() == [SEVERAL]


def test_a_slice_of_a_large_storage_is_labelled_alone():
    known, x = Labels(), torch.zeros(1000, 3)
    known.put(x[4:8], torch.arange(4)[:, None], fixed=False)
    known.put(x[8:12], torch.arange(4)[:, None], fixed=False)
    assert known.of(x[4:12])[:, 0].tolist() == [0, 1, 2, 3] * 2
    assert known.of(x[2:5])[:, 0].tolist() == [NONE, NONE, 0]


def test_labels_of_a_storage_that_is_gone_are_not_its_successors():
    known = Labels()
    for _ in range(100):
        x = torch.zeros(64)
        assert known.of(x) is None
        known.put(x, torch.tensor(1), fixed=False)
        del x
