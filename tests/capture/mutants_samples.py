"""Faults in the layouts of samples, and in the colours that find them."""

from __future__ import annotations

import torch

from dropinf.capture import passes
from dropinf.capture.colours import Colours
from dropinf.capture.recorders import Unweighted
from dropinf.capture.samples import Grid, Rows, Samples
from tests.capture.mutants import around, fault

# Samples.


@fault("two_views")
def parts_of_a_sample_dealt_out_in_turn(patch):
    def tie(old, samples, x, features=1):
        if features and samples.layout is None and x.shape[0] == 2 * samples.n:
            return Grid(0, cyclic=True).split(x, x.ndim - features, samples.n), None
        return old(samples, x, features)

    around(patch, Samples, "tie", tie)


@fault("two_views")
def first_part_of_a_sample_alone(patch):
    patch.setattr(Samples, "sum_parts", lambda samples, parts: parts[:: len(parts) // samples.n])


@fault("halves")
def two_views_taken_for_neighbours(patch):
    around(
        patch, Grid, "split",
        lambda old, grid, x, lead, n: old(Grid(grid.dim) if x.ndim > lead else grid, x, lead, n),
    )  # fmt: skip


@fault("time_first")
def positions_taken_for_samples(patch):
    around(patch, Grid, "split", lambda old, grid, x, lead, n: old(Grid(0) if x.ndim > lead else grid, x, lead, n))


@fault("time_first")
def usual_layout_assumed(patch):
    patch.setattr(passes, "learn", lambda *_: (None, True))


@fault("scattered")
def scattered_rows_by_the_inverse_order(patch):
    patch.setattr(Rows, "order", property(lambda rows: torch.argsort(torch.argsort(rows.owner, stable=True))))


@fault("scattered")
def scattered_rows_cut_one_too_late(patch):
    def later(old, rows, n):
        cu = old(rows, n).clone()
        cu[1:-1] += 1
        return cu

    around(patch, Rows, "cu_seqlens", later)


@fault("scattered")
def scattered_images_of_another_sample(patch):
    around(patch, Samples, "_sum_scattered", lambda old, samples, parts, sample: old(samples, parts, 3 - sample))


@fault("packed")
def documents_cut_one_row_too_late(patch):
    def later(old, samples, x, features=1):
        rows, cu = old(samples, x, features)
        return rows, cu if cu is None or not features else torch.cat([cu[:1], cu[1:-1] + 1, cu[-1:]])

    around(patch, Samples, "tie", later)


@fault("packed")
def documents_taken_as_equally_long(patch):
    def equal(old, samples, x, features=1):
        rows, cu = old(samples, x, features)
        return rows, cu if cu is None or not features else torch.arange(samples.n + 1, dtype=cu.dtype) * 3

    around(patch, Samples, "tie", equal)


# Colours.


@fault("scattered")
def colour_of_another_sample(patch):
    around(patch, Colours, "samples", lambda old, colours, key: (old(colours, key) + 1) % colours.n)


@fault("scattered")
def colour_digits_in_the_wrong_order(patch):
    def init(old, colours, *args, **options):
        old(colours, *args, **options)
        colours.base, colours.passes = 2, 2

    around(patch, Colours, "__init__", init)
    around(patch, Colours, "read", lambda old, colours, key, g, digit: old(colours, key, g, 1 - digit))


def factors(patch, change):
    """Change what takes the powers out again, of each sample."""
    around(patch, Unweighted, "__init__", lambda old, into, recorder, factor: old(into, recorder, change(factor)))


@fault("sorted_rows", acts=1)
def colour_powers_left_in(patch):
    factors(patch, torch.ones_like)


@fault("sorted_rows", acts=1)
def colour_powers_of_the_next_sample_taken_out(patch):
    factors(patch, lambda factor: factor.roll(1, 0))


@fault("sorted_positions", acts=1)
def colour_powers_of_codes_taken_out(patch):
    factors(patch, lambda factor: factor.sort(descending=True).values)


@fault("sorted_rows", acts=1, audit="every", heals=True)
def rows_of_another_order_confirmed(patch):
    def confirm(colours, key, g, owner, some=False):
        colours.rows[key].spread = torch.zeros(())
        return torch.tensor(True)

    patch.setattr(Colours, "confirm", confirm)
