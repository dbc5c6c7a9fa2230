"""Faults in sketched gradients of parameters that come straight from the rows of an op."""

from __future__ import annotations

import inspect

import torch

import dropinf
from dropinf.capture import direct, op_calls
from tests.capture.mutants import around, fault


def handler(patch, name, change):
    """Change what one kind of op computes: ``change(old, args, kwargs, d, g, samples, index)``."""
    around(patch, direct, name, change)


def source(patch, name, old, new):
    """Have one line of a function's source say something else."""
    function = getattr(direct, name)
    text = inspect.getsource(function)
    assert old in text
    names = dict(vars(direct))
    exec("from __future__ import annotations\n" + text.replace(old, new), names)
    patch.setattr(op_calls if name == "direct" else direct, name, names[name])


# Sums and products.


@fault("raw")
def direct_difference_taken_for_a_sum(patch):
    patch.setattr(direct, "SUMS", dict.fromkeys(direct.SUMS, 1))


@fault("raw")
def direct_product_without_its_other_factor(patch):
    patch.setattr(direct, "SUMS", direct.SUMS | dict.fromkeys(direct.PRODUCTS, 1))
    patch.setattr(direct, "PRODUCTS", set())


@fault("raw")
def direct_product_with_the_other_factor_of_the_next_sample(patch):
    source(patch, "_elementwise", "other.detach()", "other.detach().roll(1, 0)")


@fault("raw")
def direct_elementwise_columns_by_the_wrong_stride(patch):
    source(patch, "_elementwise", "* d.shape[i] + index[i]", "* d.shape[first] + index[i]")


@fault("views")
def direct_both_factors_subtracted(patch):
    source(
        patch,
        "_elementwise",
        "return -values if SUMS.get(function) == -1 and args[1] is d else values",
        "return -values",
    )


# Linear, its bias, and products of matrices.


@fault("raw", sketch=dropinf.Identity())
def direct_linear_transposed(patch):
    source(patch, "_linear", "index[0], index[1]", "index[1], index[0]")


@fault("raw")
def direct_linear_with_the_input_of_the_next_sample(patch):
    source(patch, "_linear", "args[0].detach()", "args[0].detach().roll(1, 0)")


@fault("raw")
def direct_linear_of_the_first_position_alone(patch):
    source(patch, "_linear", "g, samples", "g * (torch.arange(g.shape[1]) == 0)[:, None], samples")


@fault("tables")
def direct_bias_without_the_last_position(patch):
    source(patch, "_bias", "g, cu = samples.tie(g)", "g, cu = samples.tie(g[:, :-1])")


@fault("tables")
def direct_bias_of_the_next_column(patch):
    source(patch, "_bias", "index[0][None]", "(index[0][None] + 1) % 6")


@fault("tables", sketch=dropinf.Identity())
def direct_bias_taken_for_the_weight(patch):
    source(patch, "_handler", "_linear if args[1] is d else _bias", "_linear if len(args) == 2 else _bias")


@fault("raw", sketch=dropinf.Identity())
def direct_matrix_transposed(patch):
    source(patch, "_matmul", "index[1], index[0]", "index[0], index[1]")


@fault("raw")
def direct_matrix_with_the_gradient_of_the_next_sample(patch):
    source(patch, "_matmul", "(), g, samples", "(), g.roll(1, 0), samples")


@fault("raw")
def direct_kept_entries_in_reverse(patch):
    source(patch, "direct", "out[:, stored] = values", "out[:, stored] = values.flip(1)")


@fault("raw")
def direct_sample_of_the_first_place_for_all(patch):
    source(patch, "direct", "out[:, stored] = values", "out[:, stored] = values[:1]")


# Look-ups.


@fault("tables", sketch=dropinf.Identity())
def direct_padding_ignored(patch):
    source(patch, "_lookup", "if padding is not None:", "if False:")


@fault("tables", sketch=dropinf.Identity())
def direct_padding_one_too_high(patch):
    source(patch, "_lookup", "padding % len(d)", "(padding + 1) % len(d)")


@fault("tables", sketch=dropinf.Identity())
def direct_ids_one_too_high(patch):
    source(patch, "_lookup", "ids % len(d)", "(ids + 1) % len(d)")


@fault("tables", sketch=dropinf.Identity())
def direct_ids_of_the_next_sample(patch):
    source(patch, "_lookup", "ids % len(d)", "ids.roll(1, 0) % len(d)")


@fault("tables", sketch=dropinf.Dropout(dim=20))
def direct_table_transposed(patch):
    source(patch, "_lookup", "rows, g, index[1], index[0], cu", "rows, g, index[1], index[0].flip(0), cu")


# Views.


@fault("views")
def direct_places_in_a_view_off_by_one(patch):
    source(patch, "_places", "d.storage_offset() - base.storage_offset()", "d.storage_offset() + (d._base is not None)")


@fault("views")
def direct_view_taken_for_the_start_of_its_parameter(patch):
    source(patch, "_places", "entries - (d.storage_offset() - base.storage_offset())", "entries")


@fault("views")
def direct_view_taken_for_contiguous(patch):
    def contiguous(old, entries, d):
        strides, step = [], 1
        for size in reversed(d.shape):
            strides, step = [step, *strides], step * size
        base = d if d._base is None else d._base
        return old(entries, base.as_strided(d.shape, strides, d.storage_offset()))

    around(patch, direct, "_places", contiguous)


@fault("views")
def direct_entries_outside_of_a_view_let_in(patch):
    source(patch, "_places", "inside &= index[dim] < size", "index[dim] = index[dim].clamp(0, size - 1)")


@fault("views")
def direct_second_view_of_a_parameter_lost(patch):
    def once(old, function, args, kwargs, d, layer, g, samples):
        found = old(function, args, kwargs, d, layer, g, samples)
        return (
            torch.zeros_like(found) if found is not None and d._base is not None and d.storage_offset() == 0 else found
        )

    around(patch, op_calls, "direct", once)


# Groups.


@fault("grouped")
def direct_groups_transposed(patch):
    source(patch, "_grouped", "index[2][kept], index[1][kept]", "index[1][kept], index[2][kept]")


@fault("grouped")
def direct_groups_end_one_row_too_early(patch):
    source(patch, "_grouped", "enumerate(offsets.tolist())", "enumerate((offsets - 1).tolist())")


@fault("grouped")
def direct_group_of_the_next_expert(patch):
    source(patch, "_grouped", "index[0] == e", "index[0] == (e + 1) % 3")


@fault("grouped")
def direct_groups_by_the_samples_of_the_first(patch):
    source(patch, "_grouped", "samples.layout.sample[first:last]", "samples.layout.sample[: last - first]")


@fault("grouped")
def direct_groups_all_with_the_rows_of_the_first(patch):
    source(patch, "_grouped", "args[0][first:last]", "args[0][: last - first]")


@fault("grouped")
def direct_last_group_lost(patch):
    source(patch, "_grouped", "if last > first and len(kept):", "if last > first and len(kept) and e < 2:")
