"""Ops that use a parameter outside its module, with the samples anywhere: right, and captured at the op."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf
from dropinf.capture.op_calls import OpCall
from tests.capture.right_or_refused import Cases, built, check, doubles, runs, squares  # noqa: F401

CASES = Cases()
SIZES = (4, 4, 5, 3, 1)


class Op(nn.Module):
    """A layer, one op with raw parameters of these shapes, and a layer: x [N, T, 3] -> [N, T', 2]."""

    def __init__(self, op, *shapes):
        super().__init__()
        self.a, self.b, self.op = nn.Linear(3, 4), nn.Linear(4, 2), op
        self.p = nn.ParameterList(torch.randn(s) for s in shapes)

    def forward(self, x):
        return self.b(torch.tanh(self.op(torch.tanh(self.a(x)), *self.p)))


def case(op, *shapes):
    return Op(op, *shapes), squares, [torch.randn(n, 6, 3) for n in SIZES]


def heads(x):
    """[N, T, 4] as [2, N * T, 2]: heads first, all rows of all samples."""
    return x.reshape(-1, 2, 2).transpose(0, 1)


def joined(y, x):
    return y.transpose(0, 1).reshape(x.shape)


def joined_heads(y, x):
    """[N * 2, T, 2] as [N, T, 4]."""
    return y.unflatten(0, (len(x), 2)).transpose(1, 2).flatten(2)


def split(x):
    """[N, T, 4] as [N, 2, T, 2]: heads."""
    return x.unflatten(2, (2, 2)).transpose(1, 2)


def attention(x, mask, *rest, **more):
    return F.scaled_dot_product_attention(split(x), split(x), split(x), mask, *rest, **more).transpose(1, 2).flatten(2)


def attention_heads_first(x, mask):
    """Samples in the second dimension of all."""
    h = split(x).transpose(0, 1)
    return F.scaled_dot_product_attention(h, h, h, attn_mask=mask).permute(1, 2, 0, 3).flatten(2)


def learned_queries(x, queries, mask):
    return F.scaled_dot_product_attention(queries.expand(len(x), -1, -1), x, x, attn_mask=mask)


def by_expert(x, table):
    """Add a row of a table to each position, the positions sorted by the row."""
    rows = x.flatten(0, 1)
    expert = (rows[:, 0] > 0).long() + (rows[:, 1] > 0)
    order = expert.argsort(stable=True)
    return torch.empty_like(rows).index_copy(0, order, rows[order] + table[expert[order]]).view_as(x)


def written(x, function, *args):
    """Call an op that writes to x, or to a copy of what tanh keeps."""
    x = x.clone() if x.grad_fn is not None and "Tanh" in x.grad_fn.name() else x
    function(x, *args)
    return x


def seen_by_others(x, w):
    x = x.clone()
    other, turned = x, x.transpose(0, 1)
    x += w
    return x * 2 + other + turned.transpose(0, 1)


STATISTICS = torch.linspace(-1, 1, 6).double(), torch.linspace(0.5, 2, 6).double()
LESS, MORE = [s[:2] for s in STATISTICS], [s[:4] for s in STATISTICS]
OPS = {
    "attention_mask_of_all_heads": (lambda x, w: attention(x, w), (6, 6)),
    "attention_mask_of_each_head": (lambda x, w: attention(x, w, scale=0.3), (2, 6, 6)),
    "attention_mask_that_is_computed": (lambda x, w: attention(x, torch.tanh(w)[None], 0.0), (2, 6, 6)),
    "attention_mask_of_queries_alone": (lambda x, w: attention(x, w * torch.arange(6.0).to(w)), (6, 1)),
    "attention_of_learned_queries": (learned_queries, (1, 3, 4), (3, 6)),
    "token_for_all": (lambda x, w: torch.cat([w.expand(len(x), 1, -1), x], 1), (4,)),
    "token_broadcast": (lambda x, w: torch.cat([torch.broadcast_to(w, (len(x), 2, 4)), x], 1), (1, 2, 4)),
    "sinks": (
        lambda x, w: torch.softmax(torch.cat([x, w.reshape(1, -1, 1).expand(len(x), -1, 2)], 2), 2)[..., :4],
        (6,),
    ),
    "rows_by_expert": (by_expert, (3, 4)),
    "einsum": (lambda x, w: torch.einsum("nti,io->nto", x, w), (4, 4)),
    "einsum_of_the_weight_first": (lambda x, w: torch.einsum("oi,nti->nto", w, x), (4, 4)),
    "einsum_time_first": (lambda x, w: torch.einsum("tni,io->tno", x.transpose(0, 1), w).transpose(0, 1), (4, 4)),
    "einsum_with_heads": (lambda x, w: torch.einsum("nti,ihd->nthd", x, w).flatten(2), (4, 2, 2)),
    "einsum_that_joins_heads": (lambda x, w: torch.einsum("nthd,hdo->nto", x.unflatten(2, (2, 2)), w), (2, 2, 4)),
    "einsum_of_groups": (
        lambda x, w: torch.einsum("nthd,hde->nthe", x.unflatten(2, (2, 2)), w).flatten(2),
        (2, 2, 2),
    ),
    "einsum_of_a_diagonal": (lambda x, w: torch.einsum("nti,i->nti", x, w), (4,)),
    "einsum_with_rows_last": (lambda x, w: torch.einsum("nti,io->not", x, w).transpose(1, 2), (4, 4)),
    "einsum_over_time": (lambda x, w: torch.einsum("nti,ts->nsi", x, w), (6, 6)),
    "bmm_of_heads": (lambda x, w: joined(torch.bmm(heads(x), w), x), (2, 2, 2)),
    "baddbmm_of_heads": (lambda x, b, w: joined(torch.baddbmm(b[:, None], heads(x), w), x), (2, 2), (2, 2, 2)),
    "matmul_of_heads": (
        lambda x, w: (x.unflatten(2, (2, 2)).transpose(1, 2) @ w).transpose(1, 2).flatten(2),
        (2, 2, 2),
    ),
    "matmul_of_one_head_for_all": (lambda x, w: x[:, None].matmul(w).sum(1), (2, 4, 4)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b, 1e-3), (4,), (4,)),
    "layer_norm_by_name": (lambda x, w, b: F.layer_norm(x, [4], bias=b, weight=w), (4,), (4,)),
    "layer_norm_without_bias": (lambda x, w: F.layer_norm(x, (4,), w), (4,)),
    "layer_norm_channels_first": (
        lambda x, w, b: F.layer_norm(x.transpose(0, 1), (4,), w, b).transpose(0, 1),
        (4,),
        (4,),
    ),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w, 1e-3), (4,)),
    "added_in_place": (lambda x, w: written(x, Tensor.__iadd__, w), (6, 4)),
    "added_twice_in_place": (lambda x, v, w: written(written(x, Tensor.add_, v), Tensor.__isub__, w), (4,), (1, 6, 4)),
    "added_and_changed_in_place": (lambda x, w: written(x, Tensor.sub_, w).mul_(2).tanh_(), (6, 4)),
    "added_in_place_where_others_look": (lambda x, w: seen_by_others(x, w), (4,)),
    "set_by_a_mask": (lambda x, w: written(x, Tensor.__setitem__, x[..., 0] > 0, w), (4,)),
    "set_by_a_mask_of_samples": (lambda x, w: written(x, Tensor.__setitem__, x[:, 0, 0] > 0, w), (6, 4)),
    "set_at_a_position": (lambda x, w: written(x, Tensor.__setitem__, (slice(None), 1), w), (4,)),
    "set_twice": (
        lambda x, v, w: written(
            written(x, Tensor.__setitem__, x[..., 0] > 0, v), Tensor.__setitem__, (slice(None), slice(1, 3)), w
        ),
        (4,),
        (4,),
    ),
    "where": (lambda x, w: torch.where(x[..., :1] > 0, w, x), (4,)),
    "where_elsewhere": (lambda x, w: torch.where(x > 0, x * 2, w), (6, 4)),
    "where_of_a_method": (lambda x, w: x.where(x[..., :2].repeat(1, 1, 2) > 0, w), (1, 1, 4)),
    "where_of_a_parameter": (lambda x, w: w.where(x > 0, x), (4,)),
    "where_both": (lambda x, w: x + torch.where(x > 0, w, w), (4,)),
    "where_of_two": (lambda x, v, w: x + torch.where(x > 0, v, w), (4,), (6, 1)),
    "where_time_first": (
        lambda x, w: torch.where(x.mT.mT.transpose(0, 1) > 0, w, x.transpose(0, 1)).transpose(0, 1),
        (4,),
    ),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, *STATISTICS, w, b), (6,), (6,)),
    "batch_norm_by_name": (lambda x, w: F.batch_norm(x, *STATISTICS, weight=w, training=False, eps=1e-2), (6,)),
    "batch_norm_of_parts": (
        lambda x, w, b: torch.batch_norm(x.reshape(-1, 2, 3, 4), w, b, *LESS, False, 0.1, 1e-5, False).view_as(x),
        (2,),
        (2,),
    ),
    "batch_norm_of_rows": (lambda x, b: F.batch_norm(x.reshape(-1, 4), *MORE, bias=b).view_as(x), (4,)),
    "batch_norm_of_a_slice": (lambda x, w: F.batch_norm(x, *STATISTICS, w[1:7]), (9,)),
    "group_norm": (lambda x, w, b: F.group_norm(x, 3, w, b, 1e-3), (6,), (6,)),
    "group_norm_by_name": (lambda x, w: F.group_norm(x, num_groups=2, weight=w), (6,)),
    "repeated_for_each_head_and_sample": (
        lambda x, w: joined_heads(x.unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1).bmm(w.repeat(len(x), 1, 1)), x),
        (2, 2, 2),
    ),
    "positions_of_all_samples": (
        lambda x, r: x + torch.einsum("tnd,jnd->ntj", x.transpose(0, 1), (torch.ones(6, len(x), 4) * r)) @ x,
        (4,),
    ),
}


class Product(torch.autograd.Function):
    """A weight made of two, by a Function that no mode sees."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g @ b.t(), a.t() @ g


class Scaled(torch.autograd.Function):
    """Data times a parameter, by a Function that no mode sees."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).flatten(0, -2).sum(0)


OPS["function_of_weights"] = (lambda x, a, b: F.linear(x, Product.apply(a, b)), (4, 2), (2, 4))
for name, (op, *shapes) in OPS.items():

    def of(op=op, shapes=shapes):
        return case(op, *shapes)

    of.__name__ = name
    CASES.add()(of)


OTHERS_IN_PLACE = {
    "scaled": (lambda x, w: written(x, Tensor.__imul__, w), (6, 4)),
    "a view": (lambda x, w: written(x.clone().transpose(0, 1), Tensor.add_, w).transpose(0, 1), (4,)),
    "set in turned columns": (
        lambda x, w: written(x, Tensor.__setitem__, (slice(None), slice(None), [2, 0, 3, 1]), w),
        (4,),
    ),
    "set by numbers twice": (lambda x, w: written(x, Tensor.__setitem__, (slice(None), torch.tensor([1, 1])), w), (4,)),
    "set from a broadcast": (lambda x, w: written(x, Tensor.__setitem__, x[..., 0] > 0, w), (1,)),
    "set in raw data": (lambda x, w: written(torch.zeros_like(x), Tensor.__setitem__, x[..., 0] > 0, w) * x, (4,)),
    "into a parameter's copy": (lambda x, w: x + written(w.clone(), Tensor.__setitem__, 0, w[1]), (6, 4)),
}
for name, (op, *shapes) in OTHERS_IN_PLACE.items():

    def of(op=op, shapes=shapes):
        return case(op, *shapes)

    of.__name__ = name.replace(" ", "_")
    CASES.add()(of)


@CASES.add()
def positions_written_to_the_batch():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.c, self.b = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

        def forward(self, x):
            x += self.w
            x[:, 0] = self.c
            return self.b(torch.tanh(x))

    return Raw(), squares, [torch.randn(n, 6, 3) for n in SIZES]


@CASES.add()
def attention_mask_heads_first():
    return case(lambda x, w: attention_heads_first(x, w[:, None]), (2, 6, 6))


@CASES.add()
def function_of_data_and_a_weight():
    return case(lambda x, w: Scaled.apply(x, w), (4,))


@CASES.add()
def function_of_raw_data_and_a_weight():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.s, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

        def forward(self, x):
            return self.b(torch.tanh(Scaled.apply(x, self.w) * self.s))

    return Raw(), squares, [torch.randn(n, 6, 3) for n in SIZES]


# Old signatures, with a factor among the arguments: it is 1 in the first batch.
FACTORS = {
    "add": lambda h, c, w, _: torch.add(h, c, w),
    "add_method": lambda h, c, w, _: h.add(c, w),
    "add_computed": lambda h, c, w, _: torch.add(h, c, w * 2),
    "sub": lambda h, c, w, _: torch.sub(h, w, alpha=c),
    "add_in_place": lambda h, c, w, _: (h * 1).add_(w, alpha=c),
    "baddbmm": lambda h, c, _, v: torch.baddbmm(1.0, h, c, h, v.expand(len(h), -1, -1)),
    "baddbmm_method": lambda h, c, _, v: h.baddbmm(1.0, c, h, v.expand(len(h), -1, -1)),
    "baddbmm_matrices": lambda h, c, _, v: torch.baddbmm(
        1.0, h.transpose(0, 1), c, h.transpose(0, 1), v.expand(6, -1, -1)
    ).transpose(0, 1),
}  # fmt: skip
for name, op in FACTORS.items():

    def scaled(op=op):
        def loss(m, batch):
            m.op = lambda h, w, v: op(h, batch[1], w, v)
            return squares(m, batch[0])

        factors = (1.0, 1.0, 2.0, 1.0, 0.5)
        return Op(None, 4, (4, 4)), loss, [(torch.randn(4, 6, 3), factor) for factor in factors]

    scaled.__name__ = f"factor_{name}"
    CASES.add()(scaled)


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


@pytest.mark.parametrize("name", OPS)
def test_captured_at_the_op(name):
    model, loss_fn, batches = built(lambda: case(*OPS[name]))
    with warnings.catch_warnings(record=True) as slower:
        warnings.simplefilter("always")
        dropinf.Compressor(model, dropinf.Dropout(2), loss_fn).compress(batches)
    assert not [str(w.message) for w in slower]


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in OPS
        if ("_norm" in name or "where" in name or "in_place" in name or "set_" in name)
        and not name.endswith(("_parts", "_two"))
    ],
)
def test_sketched_from_the_rows_of_the_op(name, monkeypatch):
    """No whole gradient of a normalisation is formed."""
    model, loss_fn, batches = built(lambda: case(*OPS[name]))
    whole = []
    monkeypatch.setattr(OpCall, "_by_samples", lambda *args: whole.append(args) or [])
    dropinf.Compressor(model, dropinf.Dropout(2), loss_fn, audit="never").compress(batches)
    assert not whole
