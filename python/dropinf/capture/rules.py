"""What each op makes of its arguments' labels: the samples that an entry of its result can depend on, for any values.

A rule may take entries together that do not meet; it may not keep apart what can meet. An op without a rule takes all
of its arguments together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .colours import NONE
from .labels import Labels, Piece, joined


@dataclass
class Run:
    """One op that ran: its arguments by name, its result, and the labels that are known."""

    name: str
    function: Any
    args: Mapping[str, Any]
    out: Any
    known: Labels

    def piece(self, x: Any) -> Piece | None:
        """Return what a tensor brings, or None where it has no labels."""
        labels = self.known.of(x) if isinstance(x, Tensor) else None
        return None if labels is None else Piece(labels, self.known.is_firm(x))

    def pieces(self, values: Iterable[Any] | None = None) -> list[Piece]:
        """Return what tensors bring, those of the arguments by default."""
        found = [self.piece(x) for x in (self.tensors() if values is None else values)]
        return [piece for piece in found if piece is not None]

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the arguments."""
        return [x for value in self.args.values() for x in flat(value)]

    def dims(self, x: Tensor, default: Sequence[int] | None = None) -> list[int]:
        """Return the dimensions that the op runs along: all where it names none."""
        dim = self.args.get("dim", default)
        dims = [dim] if isinstance(dim, int) else dim
        return [d % max(1, x.ndim) for d in (dims or range(x.ndim))]

    def moves(self, index: Any) -> bool:
        """Return whether an index may have other values in a batch that runs the same ops."""
        if not isinstance(index, Tensor):
            return False
        whole = index.storage_offset() == 0 and all(
            i == 1 or j < 2 for i, j in zip(index.shape, index.stride(), strict=True)
        )
        return not (whole and self.known.is_fixed(index))


def flat(value: Any) -> list[Tensor]:
    """Return the tensors of an argument."""
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in flat(item)] if isinstance(value, list | tuple) else []


# The labels of every result, which they broadcast to, or of each.
Rule = Callable[[Run], Tensor | Sequence[Tensor]]
RULES: dict[str, Rule] = {}
_F = TypeVar("_F", bound=Rule)


def rule(*names: str) -> Callable[[_F], _F]:
    """Have a function say what becomes of labels in these ops of ATen."""

    def added(f: _F) -> _F:
        RULES.update(dict.fromkeys(names, f))
        return f

    return added


@rule(
    "clone", "_to_copy", "copy", "lift_fresh", "tril", "triu", "native_dropout", "where", "masked_fill", "bernoulli",
    "addcmul", "addcdiv", "lerp", "view_as_complex", "polar", "dropout", "nan_to_num",
    "fake_quantize_per_tensor_affine",
)  # fmt: skip
def pointwise(run: Run) -> Tensor:
    return joined(run.pieces())


@rule(
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros",
    "new_ones", "new_full", "new_empty", "new_empty_strided", "zero", "normal", "uniform", "exponential",
)  # fmt: skip
def nothing(_: Run) -> Tensor:
    return torch.tensor(NONE)


@rule("fill")
def filled(run: Run) -> Tensor:
    return joined(run.pieces([run.args["value"]]))


@rule("copy_")
def copied(run: Run) -> Tensor:
    return joined(run.pieces([run.args["src"]]))


@rule("isin", "bucketize", "searchsorted")
def looked_for(run: Run) -> Tensor:
    """Take each entry with all that it is looked for among."""
    x = run.args.get("elements", run.args.get("self"))
    if not isinstance(x, Tensor) or x.shape != flat(run.out)[0].shape:
        return together(run)
    rest = [piece.alone() for piece in run.pieces([other for other in run.tensors() if other is not x])]
    return joined([*run.pieces([x]), *rest])


def together(run: Run) -> Tensor:
    """Take all entries of all arguments together."""
    return joined([piece.alone() for piece in run.pieces()])


@rule(
    "_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp",
    "cummax", "cummin", "sort", "topk", "kthvalue", "mode", "sum", "mean", "prod", "amax", "amin", "aminmax", "max",
    "min", "argmax", "argmin", "any", "all", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
    "logsumexp", "median", "nanmedian", "nansum", "count_nonzero", "argsort", "_fft_r2c", "_fft_c2c", "_fft_c2r",
    "_cummax_helper", "glu", "linalg_cross", "unfold", "diff",
)  # fmt: skip
def along(run: Run) -> Tensor:
    x = run.tensors()[0]
    if not x.ndim:
        return joined(run.pieces())
    last = run.name in ("sort", "topk", "argsort", "glu", "kthvalue", "mode", "linalg_cross")
    dims = run.dims(x, [-1] if last else None)
    found = Piece(joined(run.pieces()).expand(x.shape), firm=True).over(dims).labels
    results = flat(run.out)
    if results and results[0].ndim < x.ndim:  # keepdim is off
        found = found.reshape([s for i, s in enumerate(found.shape) if i not in dims])
    return found


@rule(
    "mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot", "linear", "matmul", "_addmm_activation", "addr",
    "addbmm",
)  # fmt: skip
def product(run: Run) -> Tensor:
    if run.name in ("addr", "addbmm"):
        return together(run)
    tensors = [x for x in run.tensors() if x is not run.args.get("bias") or run.name != "linear"]
    a, b = tensors[-2:]
    rows, columns = run.piece(a), run.piece(b)
    found = run.pieces([*tensors[:-2], *([run.args["bias"]] if run.name == "linear" else [])])
    if rows is not None:
        rows = rows.over([-1])
        found.append(rows if b.ndim > 1 else Piece(rows.labels.squeeze(-1), rows.firm))
    if columns is not None:
        if run.name == "linear":
            columns = Piece(columns.over([-1]).labels.mT, columns.firm)
        elif b.ndim > 1:
            columns = columns.over([-2])
        else:
            columns = columns.alone()
        found.append(columns)
    return joined(found)


# Ops that keep some leading dimensions apart, and how many of their arguments have these.
_KEEP: dict[str, tuple[int, int]] = {
    **dict.fromkeys(
        (
            "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d", "mkldnn_max_pool3d",
            "max_pool2d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
            "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
            "upsample_nearest3d", "upsample_bilinear2d",
            "upsample_linear1d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
            "_upsample_bicubic2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "reflection_pad1d",
            "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
            "im2col", "col2im", "native_group_norm",
        ),
        (1, 1),
    ),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler"), (1, 2)),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        (2, 3),
    ),
    **dict.fromkeys(("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"), (1, 3)),
    **dict.fromkeys(
        (
            "linalg_inv_ex", "_linalg_det", "_linalg_slogdet", "linalg_cholesky_ex", "linalg_qr", "_linalg_svd",
            "_linalg_eigh",
        ),
        (-2, 1),
    ),
}  # fmt: skip


@rule(*_KEEP)
def kept(run: Run) -> list[Tensor]:
    keep, many = _KEEP[run.name]
    if run.name == "native_group_norm" and run.args["N"] != run.args["input"].shape[0]:
        return [together(run)] * len(flat(run.out))
    tensors, results = run.tensors(), flat(run.out)
    keep = keep if keep > 0 else tensors[0].ndim + keep
    while keep > 1 and len({x.shape[keep - 1] for x in tensors[:many]}) > 1:
        keep -= 1  # fewer heads of keys than of queries
    lead = results[0].shape[:keep]
    found = []
    for i, x in enumerate(tensors):
        piece = run.piece(x)
        if piece is not None and (i < many or (x.ndim == results[0].ndim and x.shape[:keep] == lead)):
            labels = piece.over(range(keep, x.ndim)).labels.reshape(x.shape[:keep]) if x.ndim > keep else piece.labels
            found.append(Piece(labels, piece.firm))
        elif piece is not None:
            found.append(piece.alone())
    labels = joined(found).expand(lead)
    # Others, such as a sum of exponentials, may have the kept dimensions too.
    return [labels.reshape(*lead, *[1] * (x.ndim - keep)) if x.shape[:keep] == lead else together(run) for x in results]


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_overrideable")
def convolved(run: Run) -> Tensor:
    x, weight = run.tensors()[:2]
    groups, out = int(run.args.get("groups", 1)), flat(run.out)[0]
    found = run.pieces(run.tensors()[2:])
    found = [piece.alone() for piece in found]
    image, kernel = run.piece(x), run.piece(weight)
    each = out.shape[1] // groups
    if image is not None:
        labels = image.over(range(2, x.ndim)).labels.reshape(x.shape[0], groups, -1)
        found.append(_channels(Piece(labels, image.firm), each, out.ndim))
    if kernel is not None:
        labels = kernel.over(range(1, weight.ndim)).labels.reshape(1, groups, -1)
        found.append(_channels(Piece(labels, kernel.firm), each, out.ndim))
    return joined(found)


def _channels(grouped: Piece, each: int, ndim: int) -> Piece:
    """Return [N, groups, *] as the labels of ``each`` channels a group, [N, channels, 1, ...]."""
    labels = grouped.over([2]).labels.expand(-1, -1, each)
    return Piece(labels.reshape(labels.shape[0], -1, *[1] * (ndim - 2)), grouped.firm)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def normalised(run: Run) -> Tensor:
    x = run.tensors()[0]
    piece = run.piece(x)
    rest = run.pieces(run.tensors()[1:])
    last = range(-len(run.args["normalized_shape"]), 0)
    return joined([*([piece.over(last)] if piece else []), *[p.over(range(p.labels.ndim)) for p in rest]])


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm")
def batch_normalised(run: Run) -> Tensor:
    if run.name != "_native_batch_norm_legit_no_training" and run.args.get("training", True):
        return together(run)
    tensors = run.tensors()
    return joined([*run.pieces(tensors[:1]), *[p.alone() for p in run.pieces(tensors[1:])]])


@rule("nll_loss_forward", "nll_loss2d_forward")
def nll(run: Run) -> Tensor:
    x, target = run.args["self"], run.args["target"]
    if run.args.get("reduction", 1) != 0 or x.ndim < 2:
        return together(run)
    piece = run.piece(x)
    rows = [] if piece is None else [Piece(piece.over([1]).labels.squeeze(1), piece.firm)]
    rest = [piece.alone() for piece in run.pieces([run.args.get("weight")])]
    return joined([*rows, *run.pieces([target]), *rest])


@rule(
    "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
    "soft_margin_loss",
)  # fmt: skip
def loss(run: Run) -> Tensor:
    return pointwise(run) if run.args.get("reduction", 1) == 0 else together(run)


@rule("_cdist_forward", "_euclidean_dist")
def distances(run: Run) -> Tensor:
    a, b = run.piece(run.args["x1"]), run.piece(run.args["x2"])
    rows = [a.over([-1])] if a is not None else []
    columns = [Piece(b.over([-1]).labels.mT, b.firm)] if b is not None else []
    return joined([*rows, *columns])


@rule("mkldnn_rnn_layer", "_cudnn_rnn")
def recurrent(run: Run) -> Tensor:
    turned = run.name == "_cudnn_rnn" and run.args.get("batch_first")  # which mkldnn is never given
    if turned or run.args.get("batch_sizes"):
        return together(run)
    found = []
    for x in run.tensors():
        piece = run.piece(x)
        if piece is not None and x.ndim == 3:  # [T, N, features]
            found.append(Piece(piece.over([0, 2]).labels.reshape(1, -1, 1), piece.firm))
        elif piece is not None:
            found.append(piece.alone())
    return joined(found)
