"""Faults in hooks, and in what every kind of module keeps and gives."""

from __future__ import annotations

from dataclasses import replace

import torch

import dropinf
from dropinf.capture import hooks, modules, sums
from dropinf.capture.convolution import ConvUse
from dropinf.capture.modules import EmbeddingUse, LinearUse, NormUse, Use
from dropinf.capture.passes import Call
from dropinf.capture.recorders import Compression
from dropinf.capture.taps import _Tap, inserted, listen
from tests.capture.mutants import around, fault


def record(patch, change):
    """Change the output gradient that a call hands on."""
    around(patch, Call, "record", lambda old, call, into, g, samples: old(call, into, change(call, g), samples))


def save(patch, owner, change):
    """Change what a kind of use keeps of its input."""
    around(patch, owner, "save", lambda old, use, x, out: change(use, old(use, x, out)))


def emit_weight(patch, owner, change):
    """Change the compressed gradients of a kind of use's weights."""
    around(patch, owner, "emit_weight", lambda old, use, layer, *rest: change(use, layer, old(use, layer, *rest)))


# Hooks.


@fault("squares")
def gradient_doubled(patch):
    record(patch, lambda call, g: 2 * g)


@fault("squares")
def gradient_of_the_next_sample(patch):
    record(patch, lambda call, g: g.roll(1, 0))


@fault("squares")
def gradient_of_the_first_sample_for_all(patch):
    record(patch, lambda call, g: g[:1].expand_as(g))


@fault("squares")
def gradient_with_its_sign_flipped(patch):
    record(patch, lambda call, g: -g)


@fault("squares")
def gradient_of_the_mean_loss(patch):
    record(patch, lambda call, g: g / len(g))


@fault("squares")
def gradient_in_single_precision_cut_to_eleven_bits(patch):
    record(patch, lambda call, g: g.half().double())


@fault("unequal")
def gradient_of_a_small_sample_lost(patch):
    record(patch, lambda call, g: g * (torch.arange(len(g)) < 3)[:, None])


@fault("unequal")
def gradient_of_a_small_sample_half_lost(patch):
    record(patch, lambda call, g: g * torch.tensor([1, 1, 1, 0.5])[:, None])


@fault("twice")
def second_call_lost(patch):
    def once(old, call, into, g, samples):
        calls = call.current.__dict__.setdefault("calls_seen", set())
        if call.use.name not in calls:
            old(call, into, g, samples)
        calls.add(call.use.name)

    around(patch, Call, "record", once)


@fault("twice")
def call_counted_twice(patch):
    def twice(old, recorder, use, *rest):
        old(recorder, use, *rest)
        old(recorder, use, *rest)

    around(patch, Compression, "emit", twice)


@fault("twice")
def input_of_another_call(patch):
    last = {}

    def other(use, saved):
        before = last.get(use.name, saved)
        last[use.name] = saved
        return before if use.name == "a" else saved

    save(patch, LinearUse, other)


@fault("twice")
def gradient_of_another_call(patch):
    def other(call, g):
        last = call.current.__dict__.setdefault("last", {})
        before = last.get(call.use.name, g)
        last[call.use.name] = g
        return before

    record(patch, other)


@fault("sequence")
def listening_at_a_view(patch):
    def tap(current, call, out, *, new=False):
        current.calls.add(call.signature)
        current.uses[call.use.name] = call.use
        if out.grad_fn is not None and not new:
            listen(out.grad_fn, out.output_nr, call)
            return out
        return inserted(out, current.anchor, call)

    patch.setattr(hooks, "tap", tap)


@fault("sequence")
def tap_doubles_what_it_passes_on(patch):
    around(patch, _Tap, "backward", lambda old, ctx, g: (2 * old(ctx, g)[0], None, None))


@fault("sequence")
def tap_ends_the_backward_pass(patch):
    around(patch, _Tap, "backward", lambda old, ctx, g: (torch.zeros_like(old(ctx, g)[0]), None, None))


@fault("own_hook")
def hook_behind_those_of_the_user(patch):
    patch.setattr(hooks.Capture, "_is_first", lambda *_: True)
    around(
        patch, torch.nn.Module, "register_forward_hook",
        lambda old, module, hook, **options: old(module, hook, **options | {"prepend": False}),
    )  # fmt: skip


# Uses.


@fault("squares", sketch=dropinf.Dropout(dim=5))
def square_weight_transposed(patch):
    emit_weight(patch, LinearUse, lambda use, layer, c: c.mT)


@fault("squares")
def bias_lost(patch):
    around(patch, Use, "emit", lambda old, use, *rest: (p for p in old(use, *rest) if p[0] is not use.bias))


@fault("squares")
def bias_of_another_layer(patch):
    swap = {"0.bias": "2.bias", "2.bias": "0.bias"}
    around(
        patch, Compression, "emit_part",
        lambda old, self, layer, c: old(self, replace(layer, name=swap.get(layer.name, layer.name)), c),
    )  # fmt: skip


@fault("squares", sketch=dropinf.Dropout(dim=17, mode="flat"))
def flat_mask_transposed(patch):
    around(patch, modules, "_pairs", lambda old, layer: old(layer)[::-1])


@fault("squares")
def input_features_in_another_order(patch):
    save(patch, LinearUse, lambda use, saved: saved.roll(1, -1))


@fault("twice")
def last_position_left_out(patch):
    around(
        patch, sums, "outer_products",
        lambda old, a, g, cu: old(a[:, :-1], g[:, :-1], cu) if a.shape[1] > 1 else old(a, g, cu),
    )  # fmt: skip


@fault("images")
def convolution_of_the_wrong_group(patch):
    around(
        patch, ConvUse, "inputs",
        lambda old, use, x, out: old(use, x.roll(x.shape[1] // use.groups, 1) if use.groups > 1 else x, out),
    )  # fmt: skip


@fault("images")
def convolution_padded_on_the_other_side(patch):
    def init(old, use, *rest):
        old(use, *rest)
        use.pads = use.pads[::-1]

    around(patch, ConvUse, "__init__", init)


@fault("images")
def convolution_padded_with_zeros(patch):
    def inputs(old, use, x, out):
        mode, use.conv.padding_mode = use.conv.padding_mode, "zeros"
        try:
            return old(use, x, out)
        finally:
            use.conv.padding_mode = mode

    around(patch, ConvUse, "inputs", inputs)


@fault("images")
def convolution_with_its_positions_reversed(patch):
    around(patch, ConvUse, "rows", lambda old, use, g: old(use, g).flip(1))


@fault("images", sketch=dropinf.Gaussian(dim=3))
def convolution_of_another_image(patch):
    around(patch, ConvUse, "_patches", lambda old, use, x: old(use, x).roll(1, 0))


@fault("tokens", sketch=dropinf.Identity())
def padding_counted(patch):
    patch.setattr(EmbeddingUse, "padding_idx", property(lambda use: -1))


@fault("tokens", sketch=dropinf.Identity())
def ids_one_too_high(patch):
    save(patch, EmbeddingUse, lambda use, ids: (ids + 1) % 9)


@fault("tokens", sketch=dropinf.Identity())
def repeated_ids_counted_once(patch):
    def once(old, use, layer, ids, g, samples):
        later = (ids[:, :, None] == ids[:, None]).triu(1).any(2)
        return old(use, layer, ids, g.masked_fill(later[..., None], 0), samples)

    around(patch, EmbeddingUse, "emit_weight", once)


@fault("sequence")
def norm_of_an_input_that_is_not_normalised(patch):
    patch.setattr(
        NormUse, "_inputs", lambda use, x, out, axis: use.rows(x) if axis is None else axis.apply(use.rows(x))
    )


@fault("sequence")
def norm_without_its_epsilon(patch):
    def inputs(old, use, x, out, axis):
        eps, use.module.eps = use.module.eps, 0.0
        try:
            return old(use, x, out, axis)
        finally:
            use.module.eps = eps

    around(patch, NormUse, "_inputs", inputs)


@fault("sequence")
def norm_taken_for_a_bias(patch):
    around(patch, modules, "sketched_sum", lambda old, a, *rest: old(None, *rest))


@fault("images")
def norm_of_channels_in_the_wrong_groups(patch):
    def inputs(old, use, x, out, axis):
        groups = getattr(use.module, "num_groups", None)
        if groups is None:
            return old(use, x, out, axis)
        use.module.num_groups = 1
        try:
            return old(use, x, out, axis)
        finally:
            use.module.num_groups = groups

    around(patch, NormUse, "_inputs", inputs)


@fault("images")
def norm_by_the_statistics_of_the_batch(patch):
    def inputs(old, use, x, out, axis):
        if isinstance(use.module, torch.nn.BatchNorm2d):
            x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
        return old(use, x, out, axis)

    around(patch, NormUse, "_inputs", inputs)


@fault("tied")
def tied_weight_without_its_embedding(patch):
    emit_weight(patch, EmbeddingUse, lambda use, layer, c: torch.zeros_like(c))


@fault("tied", sketch=dropinf.Identity())
def tied_weight_with_its_embedding_transposed(patch):
    emit_weight(patch, EmbeddingUse, lambda use, layer, c: c.mT)


@fault("tied")
def tied_weight_with_its_embedding_alone(patch):
    emit_weight(patch, LinearUse, lambda use, layer, c: torch.zeros_like(c))
