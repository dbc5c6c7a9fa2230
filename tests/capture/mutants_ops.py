"""Faults in the op path, in whole gradients, in what is recorded, and faults that act in later batches alone."""

from __future__ import annotations

from functools import partial

import torch

import dropinf
from dropinf.capture import exact, op_calls, sharing
from dropinf.capture.exact import ExactGradients
from dropinf.capture.layer import Layer
from dropinf.capture.modules import LinearUse
from dropinf.capture.movement import Movement
from dropinf.capture.op_calls import OpCall
from dropinf.capture.passes import Pass
from dropinf.capture.recorders import Compression
from dropinf.capture.run import Run
from tests.capture.mutants import DENSE, Batches, around, fault
from tests.capture.mutants_hooks import record

# Ops.


def chunk_by_chunk(patch):
    """Have one sample a chunk."""
    patch.setattr(op_calls, "CHUNK_BYTES", 1)


def whole(patch, change, function):
    """Change the whole gradients that the ops of one function give."""

    def changed(old, call, *rest):
        found = old(call, *rest)
        return change(found) if call.function.__name__ == function else found

    around(patch, OpCall, "_whole", changed)


@fault("raw", sketch=DENSE)
def difference_taken_for_a_sum(patch):
    patch.setattr(op_calls, "SUMS", dict.fromkeys(op_calls.SUMS, 1))


@fault("raw", sketch=DENSE)
def product_with_the_data_of_another_chunk(patch):
    chunk_by_chunk(patch)
    around(
        patch, OpCall, "_whole",
        lambda old, call, d, g, first, n: old(call, d, g, 0 if call.function in op_calls.PRODUCTS else first, n),
    )  # fmt: skip


@fault("raw", sketch=DENSE)
def broadcast_dimension_not_summed(patch):
    def first(g, d):
        g = g.sum(1)
        shape = (*[1] * (g.ndim - 1 - d.ndim), *d.shape)[1 - g.ndim :]
        for dim, size in enumerate(shape, 1):
            g = g.narrow(dim, 0, size)
        return g.reshape(len(g), *d.shape)

    patch.setattr(op_calls, "_reduced", first)


@fault("raw", sketch=DENSE)
def product_without_its_other_factor(patch):
    patch.setattr(op_calls, "SUMS", op_calls.SUMS | dict.fromkeys(op_calls.PRODUCTS, 1))


@fault("raw", sketch=DENSE)
def square_matrix_transposed(patch):
    whole(patch, lambda found: found.mT, "matmul")


@fault("raw", sketch=DENSE)
def functional_linear_transposed(patch):
    whole(patch, lambda found: found.mT, "linear")


@fault("raw", sketch=DENSE)
def op_with_the_input_of_the_next_sample(patch):
    around(patch, OpCall, "_input", lambda old, call, *rest: old(call, *rest).roll(1, 0))


@fault("raw")
def mapped_gradient_of_the_next_sample(patch):
    around(patch, OpCall, "_mapped", lambda old, call, d, g, first, n: old(call, d, g.roll(1, 0), first, n))


@fault("raw")
def expanded_tensor_of_the_first_sample_alone(patch):
    whole(patch, lambda found: found * (torch.arange(len(found)) == 0).view(-1, 1, 1, 1), "expand")


@fault("raw", sketch=DENSE)
def product_of_one_sample_twice(patch):
    whole(patch, lambda found: torch.cat([found[:1], found[:-1]]), "mul")


@fault("raw")
def computed_weight_taken_for_its_parameter(patch):
    def direct(old, call, d, found):
        rows = list(old(call, d, found))
        return [(layer, found) for layer, _ in rows] if len(rows) == 1 else rows

    around(patch, OpCall, "_to_parameters", direct)


@fault("raw")
def gradients_of_two_parameters_exchanged(patch):
    def exchanged(old, call, d, found):
        rows = list(old(call, d, found))
        return list(zip([layer for layer, _ in rows], [g for _, g in rows][::-1], strict=True))

    around(patch, OpCall, "_to_parameters", exchanged)


@fault("raw")
def second_parameter_of_a_weight_lost(patch):
    around(patch, OpCall, "_to_parameters", lambda old, *rest: list(old(*rest))[:1])


@fault("raw")
def op_counted_twice(patch):
    def twice(old, call, into, g, samples):
        old(call, into, g, samples)
        old(call, into, g, samples)

    around(patch, OpCall, "record", twice)


# Whole gradients.


def route(patch, name, change):
    """Change the gradients of a chunk on one of the routes."""
    around(patch, ExactGradients, name, lambda old, *rest: {n: change(n, g) for n, g in old(*rest).items()})


@fault("squares", route="vmap")
def mapped_rows_shifted_by_one_sample(patch):
    route(patch, "_vmapped", lambda name, g: g.roll(1, 0))


@fault("squares", route="vmap")
def mapped_rows_doubled(patch):
    route(patch, "_vmapped", lambda name, g: 2 * g)


@fault("squares", route="vmap")
def mapped_rows_zero(patch):
    route(patch, "_vmapped", lambda name, g: torch.zeros_like(g) if name == "2" else g)


@fault("squares", route="vmap")
def mapped_rows_of_another_chunk(patch):
    patch.setattr(exact, "CHUNK_BYTES", 2000)
    first = {}
    route(patch, "_vmapped", lambda name, g: first.setdefault((name, len(g)), g))


@fault("squares", route="vmap")
def mapped_rows_of_another_parameter(patch):
    def other(old, *rest):
        found = old(*rest)
        return found | {"0": found["2"], "2": found["0"]}

    around(patch, ExactGradients, "_vmapped", other)


@fault("raw", route="vmap")
def mapped_rows_transposed(patch):
    route(patch, "_vmapped", lambda name, g: g.mT if name == "left" else g)


@fault("squares", route="alone")
def rows_alone_shifted_by_one_sample(patch):
    route(patch, "_alone", lambda name, g: g.roll(1, 0))


@fault("squares", route="alone")
def rows_alone_added_to_those_before(patch):
    route(patch, "_alone", lambda name, g: g.cumsum(0))


@fault("squares", route="alone")
def last_row_alone_lost(patch):
    route(patch, "_alone", lambda name, g: torch.cat([g[:-1], torch.zeros_like(g[:1])]))


@fault("squares", route="backward", refused=True)
def last_rung_doubled(patch):
    around(patch, ExactGradients, "_gradients", lambda old, *a, **k: {n: 2 * g for n, g in old(*a, **k).items()})


@fault("squares", route="backward", refused=True)
def last_rung_of_the_first_sample_for_all(patch):
    first = {}
    around(
        patch, ExactGradients, "_gradients",
        lambda old, *a, **k: {n: first.setdefault(n, g) for n, g in old(*a, **k).items()},
    )  # fmt: skip


def gradient_in_parts(patch):
    """Have the last part of a gradient that comes in several overwrite the others."""

    def overwrite(old, model, take):
        def instead(p, add, g):
            add(g - given.get(p, 0))
            given[p] = g

        given = {}
        return old(model, {p: partial(instead, p, add) for p, add in take.items()})

    around(patch, exact, "gradients_taken", overwrite)


@fault("in_parts", route="alone", refused=True)
def rows_alone_without_the_first_part(patch):
    gradient_in_parts(patch)


@fault("in_parts", route="backward", refused=True)
def last_rung_without_the_first_part(patch):
    gradient_in_parts(patch)


# What is recorded.


@fault("twice")
def call_overwritten_not_summed(patch):
    patch.setattr(Compression, "emit_part", lambda self, layer, c: self._found.__setitem__(layer.name, c))


@fault("squares", refused=True, route="vmap")
def chunks_in_reverse(patch):
    patch.setattr(exact, "CHUNK_BYTES", 1)

    def finish(old, recorder, layers, losses):
        for parts in recorder._parts.values():
            parts.reverse()
        return old(recorder, layers, losses)

    around(patch, Compression, "finish", finish)


@fault("squares", refused=True)
def layers_of_one_shape_exchanged(patch):
    swap = {"0": "2", "2": "0"}
    around(
        patch, Compression, "finish",
        lambda old, recorder, layers, losses: (s := old(recorder, layers, losses)) | {a: s[b] for a, b in swap.items()},
    )  # fmt: skip


@fault("squares", refused=True)
def last_sample_dropped(patch):
    around(
        patch, Compression, "finish",
        lambda old, *rest: {n: c * (torch.arange(len(c)) < 3).view(-1, *[1] * (c.ndim - 1)) for n, c in old(*rest).items()},
    )  # fmt: skip


@fault("squares", refused=True)
def two_samples_averaged(patch):
    around(
        patch, Compression, "finish",
        lambda old, *rest: {n: (c + c[[1, 0, 2, 3]]) / 2 for n, c in old(*rest).items()},
    )  # fmt: skip


@fault("squares", route="vmap", sketch=dropinf.Dropout(dim=5), refused=True)
def sketch_of_whole_gradients_transposed(patch):
    old = Layer.entries.func
    patch.setattr(
        Layer, "entries",
        property(lambda self: old(self) if self.in_axis is None else old(self).view(self.stored_shape).T.flatten()),
    )  # fmt: skip


# Later batches.


@fault("ranks", acts=1)
def input_of_the_next_sample_where_there_are_positions(patch):
    record(patch, lambda call, g: g.roll(1, 0) if g.ndim == 3 else g)


@fault("sizes", acts=1)
def one_sample_alone_doubled(patch):
    record(patch, lambda call, g: 2 * g if len(g) == 1 else g)


@fault("branches", acts=2)
def module_of_a_later_batch_doubled(patch):
    record(patch, lambda call, g: 2 * g if call.use.name == "b" else g)


@fault("detached", acts=1)
def module_of_a_later_gradient_doubled(patch):
    record(patch, lambda call, g: 2 * g if call.use.name == "b" else g)


def from_batch(patch, first, change, last=1000):
    """Change output gradients from a batch on, counted from 0."""
    batches = Batches(patch)
    record(patch, lambda call, g: change(call, g) if first <= batches.begun - 1 <= last else g)


@fault("many_batches", acts=3, refused=True)
def fourth_batch_alone(patch):
    from_batch(patch, 3, lambda call, g: g.roll(1, 0), last=3)


@fault("many_batches", acts=15, refused=True)
def from_the_sixteenth_batch_on(patch):
    from_batch(patch, 15, lambda call, g: 2 * g)


@fault("many_batches", acts=2, audit="every")
def third_batch_alone(patch):
    from_batch(patch, 2, lambda call, g: -g, last=2)


@fault("twice", acts=1, audit="every")
def input_of_the_batch_before(patch):
    batches = Batches(patch)
    around(patch, LinearUse, "save", lambda old, use, x, out: batches.stale(use.name, old(use, x, out)))


@fault("twice", acts=1, audit="every")
def gradient_of_the_batch_before(patch):
    batches = Batches(patch)
    record(patch, lambda call, g: batches.stale(call.use.name, g))


@fault("many_batches", acts=1, audit="every", refused=True)
def rows_of_the_batch_before(patch):
    batches = Batches(patch)
    around(
        patch, Compression, "finish",
        lambda old, *rest: {n: batches.stale(n, c) for n, c in old(*rest).items()},
    )  # fmt: skip


@fault("halves", acts=1, audit="every", heals=True)
def layout_of_the_first_batch_forgotten(patch):
    patch.setattr(sharing, "settled", lambda *given: given[-1])

    def backward(old, current, losses):
        current.layouts = {}
        old(current, losses)

    around(patch, Pass, "backward", backward)


@fault("sorted_rows", acts=1, audit="every", heals=True)
def rows_that_move_not_noticed(patch):
    patch.setattr(Run, "_stay_apart", lambda run, current: True)


@fault("resting", acts=1, audit="every", heals=True)
def first_gradient_of_a_layer_at_rest_not_noticed(patch):
    patch.setattr(sharing, "settled", lambda *given: given[-1])

    def settle(old, current):
        old(current)
        current.unproven -= current.blank

    around(patch, Pass, "settle", settle)


@fault("either_way", acts=1, audit="every", heals=True)
def path_of_functions_not_noticed(patch):
    patch.setattr(Movement, "fingerprint", lambda movement: 0)
    patch.setattr(Movement, "functions", frozenset())
    patch.setattr(Run, "_stay_apart", lambda run, current: True)


@fault("many_batches", acts=1, audit="every", heals=True)
def batch_that_needs_no_colours_doubled(patch):
    around(patch, Pass, "backward", lambda old, current, losses: old(current, 2 * losses))
