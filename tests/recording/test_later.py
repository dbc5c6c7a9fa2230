"""What one forward shows is not taken for true of another: rows are right in every step, or refused."""

# ruff: noqa: PT012 (a loop of several statements is what raises)

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf

N, STEPS = 6, 9


class Twice(nn.Module):
    """One layer for two views at once, and again for an output that the loss may not use."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor, step: int) -> Tensor:
        a, b = self.one(torch.cat([x, x * 1.5 + 1])).tanh().chunk(2)
        beside = self.two(self.one(x - 1).tanh())
        return torch.stack([self.two(a * b), beside], 1)[:, 0]


class Pair(Twice):
    def forward(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = self.one(torch.cat([x, x * 1.5 + 1])).tanh().chunk(2)
        return self.two(a * b), self.two(self.one(x - 1).tanh())


class Loop(Twice):
    """As many calls as the step says, the first of two views."""

    def forward(self, x: Tensor, step: int) -> Tensor:
        a, b = self.one(torch.cat([x, -x])).tanh().chunk(2)
        for i in range(1 + step % 3):
            a = a + self.one(x + i).tanh()
        return self.two(a + b)


class Swapped(Twice):
    def forward(self, x: Tensor, step: int) -> Tensor:
        def both() -> Tensor:
            return self.one(torch.cat([x, -x])).tanh().view(2, N, -1).sum(0)

        if step < 3:
            first = both()
            return self.two(first * self.one(x).tanh())
        first = self.one(x).tanh()
        return self.two(both() * first)


class Sorted(Twice):
    """Its rows follow the data, from a step on."""

    def forward(self, x: Tensor, step: int) -> Tensor:
        key = x[:, 0] if step > 3 else torch.arange(N).float()
        order = key.argsort()
        return self.two(self.one(x[order]).tanh()[order.argsort()])


class Mixup(Twice):
    """Samples meet, from a step on."""

    def forward(self, x: Tensor, step: int) -> Tensor:
        h = self.one(x).tanh()
        return self.two(h + h.roll(1, 0) if step > 3 else h)


class Turned(Twice):
    """Time first from a step on, with as many positions as samples."""

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = x[:, None] * torch.arange(1, N + 1).view(1, N, 1)
        return (
            self.two(self.one(x.transpose(0, 1)).tanh()).mean(0) if step > 3 else self.two(self.one(x).tanh()).mean(1)
        )


class Table(Twice):
    """A layer for a table of all samples, and from a step on for one row of each."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.Linear(7, 9)
        self.register_buffer("places", torch.randn(N, 7))

    def forward(self, x: Tensor, step: int) -> Tensor:
        if step > 3:
            return self.two((self.one(x) + self.three(x)).tanh())
        x = x[:, None] * torch.arange(1, N + 1).view(1, N, 1)
        return self.two((self.one(x) + self.three(self.places)).tanh()).mean(1)


class Single(Twice):
    """A table of one position."""

    def forward(self, x: Tensor, step: int) -> Tensor:
        places = 1 if step % 2 == 0 else 3
        x = x[:, None].expand(-1, places, -1) + 0
        return self.two(self.one(x) + self.one(torch.arange(7.0 * places).view(places, 7))).mean(1)


class Switched(Twice):
    """A norm that is put in train mode while the model's own mode stays."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(9).eval()

    def forward(self, x: Tensor, step: int) -> Tensor:
        self.norm.train(step > 3)
        return self.two(self.norm(self.one(x)))


def loss(out: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(out[0] if isinstance(out, tuple) else out, labels, reduction="none")


def run(model: nn.Module, out: Any, steps: int = STEPS, parts: Callable = loss) -> list[float]:
    """The relative error of each step's rows; stops where the recording refuses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    errors: list[float] = []
    try:
        with dropinf.record(model, dropinf.Identity(), optimizer, out=out) as recording:
            for step in range(steps):
                x, labels = torch.randn(N, 7), torch.randint(0, 5, (N,))
                before = copy.deepcopy(model)
                want = []
                for i in range(N):
                    before.zero_grad()
                    (parts(before(x, step), labels)[i] / N).backward()
                    parts_of = {
                        n: torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                        for n, p in before.named_parameters()
                    }
                    want.append(parts_of)
                optimizer.zero_grad()
                recording.samples(range(N))
                parts(model(x, step), labels).mean().backward()
                optimizer.step()
                held = {layer.parameter: (name, layer) for name, layer in recording._layers.items()}
                rows = recording.rows(step).split(list(recording.columns.widths), 1)
                columns = dict(zip(recording.shapes, rows, strict=True))
                names = [n for n, _ in model.named_parameters() if n in held]
                got = torch.cat([columns[held[n][0]] for n in names], 1)
                wanted = torch.stack([torch.cat([row[n] for n in names]) for row in want])
                errors.append(float((got - wanted).norm() / wanted.norm()))
    except dropinf.AttributionError:
        errors.append(-1.0)
    return errors


@pytest.mark.filterwarnings("ignore:model. ")
@pytest.mark.parametrize("kind", [Twice, Pair, Loop, Swapped, Sorted, Mixup, Turned, Table, Single, Switched])
def test_rows_of_every_step_are_right_or_refused(kind, tmp_path) -> None:
    torch.manual_seed(0)
    errors = run(kind(), tmp_path)
    assert all(error < 1e-3 for error in errors), errors
    refused = {Sorted: 5, Mixup: 5, Switched: 5}.get(kind)
    if refused is None:
        assert len(errors) == STEPS, errors
        assert min(errors) >= 0, errors
    else:
        assert errors[-1] == -1.0, errors
        assert len(errors) == refused, errors


def test_two_backwards_of_one_forward(tmp_path) -> None:
    class TimeFirst(Twice):
        def forward(self, x: Tensor, step: int) -> Tensor:
            x = x[:, None] * torch.arange(1, 13).view(1, 12, 1)
            return self.two(self.one(x.transpose(0, 1)).tanh()).mean(0)

    torch.manual_seed(0)
    model = TimeFirst()
    optimizer = torch.optim.AdamW(model.parameters())
    with dropinf.record(model, dropinf.Identity(), optimizer, out=tmp_path) as recording:
        for step in range(5):
            x, labels = torch.randn(N, 7), torch.randint(0, 5, (N,))
            before = copy.deepcopy(model)
            out = before(x, step)
            parts = F.cross_entropy(out, labels, reduction="none") / N + out.square().sum(1)
            want = torch.stack(
                [torch.autograd.grad(p, before.one.weight, retain_graph=True)[0].flatten() for p in parts]
            )
            optimizer.zero_grad()
            recording.samples(range(N))
            out = model(x, step)
            F.cross_entropy(out, labels).backward(retain_graph=True)
            out.square().sum().backward()
            optimizer.step()
            got = recording.rows(step)[:, : want.shape[1]]
            assert (got - want).norm() <= 1e-3 * want.norm()


def test_an_output_that_is_kept_in_an_attribute(tmp_path) -> None:
    class Hidden(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(9, 5)

        def forward(self, x: Tensor, step: int) -> Tensor:
            h = self.one(x).tanh()
            self.beside = self.side(h)
            return self.two(h)

    torch.manual_seed(0)
    model = Hidden()
    optimizer = torch.optim.AdamW(model.parameters())
    recording = dropinf.record(model, dropinf.Identity(), optimizer, out=tmp_path)
    x = torch.randn(N, 7)
    with pytest.raises(dropinf.AttributionError, match="layer side: a gradient reaches it otherwise"), recording:
        recording.samples(range(N))
        (model(x, 0).square().sum() + model.beside.square().sum()).backward()
        optimizer.step()


def test_training_with_a_table_is_unchanged_or_refused(tmp_path) -> None:
    finals = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = Table()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recording = dropinf.record(model, dropinf.Identity(), optimizer, out=tmp_path) if recorded else None
        with recording or torch.enable_grad():
            for step in range(STEPS):
                x, labels = torch.randn(N, 7), torch.randint(0, 5, (N,))
                optimizer.zero_grad()
                if recording is not None:
                    recording.samples(range(N))
                try:
                    F.cross_entropy(model(x, step), labels).backward()
                except dropinf.AttributionError:
                    return
                optimizer.step()
        finals.append([*model.parameters()])
    assert all(map(torch.equal, *finals))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))


def loop(out: Any, touch: Callable, make: Callable, steps: int = 6, **options: Any) -> dropinf.Recording:
    """A recorded loop in which something is touched before each update."""
    model = small()
    optimizer = make(model.parameters())
    with dropinf.record(model, dropinf.Identity(), optimizer, out=out, **options) as recording:
        for step in range(steps):
            optimizer.zero_grad()
            recording.samples(range(N))
            F.cross_entropy(model(torch.randn(N, 7)), torch.randint(0, 5, (N,))).backward()
            touch(step, model, optimizer)
            optimizer.step()
    return recording


def momentum(step: int, _model: Any, optimizer: Any) -> None:
    if step == 2:
        optimizer.param_groups[0].update(momentum=0.9)


TOUCHES: dict[str, tuple[Callable, str]] = {
    "data clamped": (
        lambda _s, m, _o: [p.grad.data.clamp_(-0.01, 0.01) for p in m.parameters()],
        "not by the one factor",
    ),
    "divided": (lambda _s, m, _o: [p.grad.div_(4) for p in m.parameters()], "clipping to one norm does not do"),
    "negated": (lambda _s, m, _o: [p.grad.neg_() for p in m.parameters()], "sign was changed"),
    "state cleared": (
        lambda s, _m, o: s == 2 and o.state.clear(),
        "not where the recorded steps lead",
    ),
    "a later hook": (
        lambda s, m, o: (
            s == 0 and o.register_step_pre_hook(lambda *_: [p.grad.mul_(0.01) for p in m.parameters()] and None)
        ),
        "its exp_avg is not what the recorded gradients make",
    ),
    "maximize": (lambda s, _m, o: s == 2 and o.param_groups[0].update(maximize=True), "has maximize=True"),
    "amsgrad": (lambda s, _m, o: s == 2 and o.param_groups[0].update(amsgrad=True), "has amsgrad=True"),
    "another group": (
        lambda s, m, o: s == 2 and o.add_param_group({"params": [nn.Parameter(m[0].weight.detach().clone())]}),
        "parameter groups are others",
    ),
    "frozen": (lambda s, m, _o: s == 2 and m[0].weight.requires_grad_(False), "was frozen"),
    "a hook on a gradient": (lambda s, m, _o: s == 2 and m[0].weight.register_hook(lambda g: g * 2), "has hooks"),
}


@pytest.mark.parametrize("name", TOUCHES)
def test_what_is_done_to_the_optimizer_is_seen(name: str, tmp_path) -> None:
    touch, message = TOUCHES[name]
    with pytest.raises((ValueError, dropinf.AttributionError), match=message):
        loop(tmp_path, touch, lambda p: torch.optim.AdamW(p, lr=1e-2))


def test_momentum_that_comes_later(tmp_path) -> None:
    with pytest.raises(ValueError, match="momentum now"):
        loop(tmp_path, momentum, lambda p: torch.optim.SGD(p, lr=1e-2))


def test_a_scaler_whose_loss_is_not_scaled(tmp_path) -> None:
    with pytest.raises(dropinf.AttributionError, match="multiplied by"):
        loop(tmp_path, lambda *_: None, torch.optim.AdamW, scaler=torch.amp.GradScaler("cpu"))


def test_closures_are_refused(tmp_path) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    recording = dropinf.record(model, dropinf.Identity(), optimizer, out=tmp_path)
    with pytest.raises(ValueError, match="closure"), recording:
        optimizer.step(lambda: model(torch.randn(N, 7)).sum())


def test_samples_without_a_share_count_for_nothing(tmp_path) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    share = torch.tensor([1, 1, 0, 1, 1, 1.0]) / 5

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def batch() -> Any:
        return torch.randn(N, 7), torch.randint(0, 5, (N,))

    with dropinf.record(model, dropinf.Identity(), optimizer, out=tmp_path) as recording:
        for step in range(4):
            optimizer.zero_grad()
            recording.samples(torch.arange(N) + 10 * step, share=share)
            (losses(model, batch()) * share).sum().backward()
            optimizer.step()
        with pytest.raises(ValueError, match="share has a number that is negative"):
            recording.samples(range(N), share=-share)
    query = dropinf.Compressor.from_masks(recording.masks, model, losses).compress([batch()])
    scores = dropinf.score(query, recording, kind="adamw")
    assert scores.values.isfinite().all()
    assert scores.ids[:3] == ["0", "1", "2"]
    assert not scores.values[:, [2, 8, 14, 20]].any()
    assert scores.values.any()


def test_a_batch_that_is_discarded_is_not_the_steps(tmp_path) -> None:
    """However small its gradients are beside the step's."""
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    with dropinf.record(model, dropinf.Identity(), optimizer, out=tmp_path) as recording:
        for size, name in ((1e-6, "thrown away"), (1.0, "kept")):
            optimizer.zero_grad()
            recording.samples([name] * N)
            (F.cross_entropy(model(torch.randn(N, 7)), torch.randint(0, 5, (N,))) * size).backward()
        optimizer.step()
    assert recording.ids(0) == ["kept"] * N


def test_one_folder_has_one_recording(tmp_path) -> None:
    recordings = []
    for _ in range(2):
        model = small()
        recordings.append(
            dropinf.record(model, dropinf.Identity(), torch.optim.AdamW(model.parameters()), out=tmp_path)
        )
    with recordings[0], pytest.raises(RuntimeError, match="another recording writes"):
        recordings[1].__enter__()
