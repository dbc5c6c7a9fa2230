"""Reentrant checkpoints around raw parameters, attention and recurrent layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.capture.right_or_refused import Cases, Raw, check, doubles, points, runs, squares  # noqa: F401

CASES = Cases()
SIZES = (4, 4, 5, 3, 1)


class Checkpointed(nn.Module):
    """A block between two layers, recomputed in backward."""

    def __init__(self, block, reentrant=True, call=lambda block, h: block(h)):
        super().__init__()
        self.a, self.block, self.c = nn.Linear(3, 4), block, nn.Linear(4, 1)
        self.reentrant, self.call = reentrant, call

    def forward(self, x):
        h = checkpoint(lambda h: self.call(self.block, h), self.a(x), use_reentrant=self.reentrant)
        return self.c(h)


def sequences(*sizes):
    return [torch.randn(n, 5, 3) for n in sizes or SIZES]


@CASES.add()
def reentrant_around_a_linear():
    return Checkpointed(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), squares, points()


@CASES.add()
def reentrant_around_raw_parameters():
    return Checkpointed(Raw()), squares, points()


@CASES.add()
def reentrant_around_raw_parameters_of_sequences():
    return Checkpointed(Raw()), squares, sequences()


@CASES.add()
def not_reentrant_around_raw_parameters():
    return Checkpointed(Raw(), reentrant=False), squares, points()


@CASES.add()
def reentrant_around_attention():
    mha = nn.MultiheadAttention(4, 2, batch_first=True)
    return Checkpointed(mha, call=lambda m, h: m(h, h, h, need_weights=False)[0]), squares, sequences()


@CASES.add()
def reentrant_around_attention_time_first():
    mha = nn.MultiheadAttention(4, 2)
    return Checkpointed(mha, call=lambda m, h: m(*[h.transpose(0, 1)] * 3)[0].transpose(0, 1)), squares, sequences()


@CASES.add()
def reentrant_around_gru():
    return Checkpointed(nn.GRU(4, 4, batch_first=True), call=lambda m, h: m(h)[0]), squares, sequences()


@CASES.add()
def reentrant_around_lstm_time_first():
    return Checkpointed(nn.LSTM(4, 4), call=lambda m, h: m(h.transpose(0, 1))[0].transpose(0, 1)), squares, sequences()


@CASES.add()
def reentrant_around_gru_cell():
    return Checkpointed(nn.GRUCell(4, 4), call=lambda m, h: m(h, m(h))), squares, points()


@CASES.add()
def reentrant_inside_reentrant():
    return Checkpointed(Checkpointed2(), call=lambda m, h: m(h)), squares, points()


class Checkpointed2(nn.Module):
    """A checkpoint of its own around one of two raw blocks."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Raw(), Raw()

    def forward(self, h):
        return self.b(checkpoint(self.a, h, use_reentrant=True))


@CASES.add()
def reentrant_block_called_twice():
    return Checkpointed(Raw(), call=lambda m, h: m(m(h))), squares, points()


@CASES.add()
def reentrant_sequential():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.s = nn.Linear(3, 4), nn.Sequential(Raw(), nn.LayerNorm(4), Raw(), nn.Linear(4, 2))

        def forward(self, x):
            return checkpoint_sequential(self.s, 2, self.a(x), use_reentrant=True)

    return Two(), squares, points()


@CASES.add(skips=frozenset({"block.w", "block.b"}))
def reentrant_around_inputs_without_gradient():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.c = Raw(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.c(checkpoint(self.block, x, use_reentrant=True))

    return First(), squares, points()


@CASES.add()
def reentrant_with_penalty_outside():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.block = nn.Linear(3, 4), Raw()

        def forward(self, x):
            h = self.a(x)
            return torch.cat([checkpoint(self.block, h, use_reentrant=True), h], 1)

    return Outside(), squares, points()


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
