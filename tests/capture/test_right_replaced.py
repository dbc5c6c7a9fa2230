"""Parameters that are replaced after the Compressor was made, and weights that are computed from parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.capture.right_or_refused import Cases, check, doubles, mlp, points, runs, squares  # noqa: F401

CASES = Cases()


def assign(m):
    torch.manual_seed(5)
    m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()}, assign=True)


def new_head(m):
    torch.manual_seed(5)
    m[2] = nn.Linear(4, 1)


def wider_head(m):
    torch.manual_seed(5)
    m[2] = nn.Linear(4, 3)


def new_parameter(m):
    torch.manual_seed(5)
    m[0].weight = nn.Parameter(torch.randn(4, 3))


def old_weight_norm(m):
    torch.nn.utils.weight_norm(m[0])


def new_weight_norm(m):
    parametrizations.weight_norm(m[2])


def pruned(m):
    prune.l1_unstructured(m[0], "weight", 0.5)


def in_place(m):
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(-2)


def data_swapped(m):
    torch.manual_seed(5)
    m[0].weight.data = torch.randn(4, 3)


def frozen(m):
    m[0].weight.requires_grad_(False)


def added(m):
    torch.manual_seed(5)
    m.append(nn.Linear(1, 2))


AFTER = [
    assign,
    new_head,
    wider_head,
    new_parameter,
    old_weight_norm,
    new_weight_norm,
    pruned,
    in_place,
    data_swapped,
    frozen,
    added,
]
for change in AFTER:

    def replaced():
        return mlp(), squares, points()

    replaced.__name__ = f"after_{change.__name__}"
    CASES.add(
        after=change,
        right=change in (in_place, data_swapped),
        twin=change is not frozen,
        skips=frozenset({"3.weight", "3.bias"} if change is added else ()),
    )(replaced)


class RawModel(nn.Module):
    """Raw parameters alone."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        return torch.tanh(x @ self.w) + self.b


def new_raw(m):
    torch.manual_seed(5)
    m.w = nn.Parameter(torch.randn(3, 2))


for change in (assign, new_raw):

    def replaced_raw():
        return RawModel(), squares, points()

    replaced_raw.__name__ = f"after_{change.__name__}_of_raw"
    CASES.add(after=change, right=False)(replaced_raw)


for change in (old_weight_norm, new_weight_norm, pruned):

    def computed(change=change):
        m = mlp()
        change(m)
        return m, squares, points()

    computed.__name__ = f"before_{change.__name__}"
    CASES.add(but=frozenset({"weight"}))(computed)


@CASES.add(but=frozenset({"weight"}))
def old_spectral_norm():
    m = mlp()
    torch.nn.utils.spectral_norm(m[0])
    return m.eval(), squares, points()


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
