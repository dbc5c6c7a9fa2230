"""The pass backwards is the adjoint of the optimizers: against autograd through their updates, and retraining."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

import dropinf
from dropinf.recording.adjoint import Curvature, Past, bent, effects
from dropinf.recording.optimizers import AdamUpdate, Columns

SAMPLES, STEPS, MICRO, CLIP = 6, 10, 2, 0.7
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "dampened": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
}


class Linear(nn.Module):
    """Its outputs times fixed numbers are a loss that is linear in the weights; a part of it may rest."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.resting = nn.Linear(5, 4), nn.Linear(5, 3, bias=False), nn.Linear(5, 2)

    def forward(self, x: Tensor, all_of_it: bool) -> Tensor:
        parts = [self.one(x), self.two(x)] + ([self.resting(x)] if all_of_it else [])
        return torch.cat(parts, 1)


def batch(step: int, micro: int) -> tuple[Tensor, Tensor, bool]:
    generator = torch.Generator().manual_seed(100 * step + micro)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    reached = step % 3 != 1  # in other steps a layer gets no gradient, and its moments stand still
    return draw(SAMPLES, 5), draw(SAMPLES, 9 if reached else 7), reached


def losses(model: nn.Module, given: tuple[Tensor, Tensor, bool]) -> Tensor:
    return (model(given[0], given[2]) * given[1]).sum(1)


def groups(model: Linear) -> list[dict]:
    rest = [*model.two.parameters(), *model.resting.parameters()]
    return [{"params": model.one.parameters(), "lr": 1e-2}, {"params": rest, "lr": 3e-2, "weight_decay": 0.3}]


def rate(step: int) -> float:
    return 1 / (1 + step)


def through_sgd(weights: list[Tensor], gradients: list[Tensor | None], state: dict, settings: list[dict], scale: float):
    """SGD's step, as autograd can go through it: torch's own detaches its first momentum."""
    after = []
    for i, (w, g, s) in enumerate(zip(weights, gradients, settings, strict=True)):
        if g is None:
            after.append(w)
            continue
        g = g + s["weight_decay"] * w
        if s["momentum"]:
            state[i] = g if i not in state else s["momentum"] * state[i] + (1 - s["dampening"]) * g
            g = g + s["momentum"] * state[i] if s["nesterov"] else state[i]
        after.append(w - s["lr"] * scale * g)
    return after


def effects_by_autograd(name: str, model: Linear, query: tuple) -> tuple[Tensor, list[Tensor]]:
    """How much each sample's part of each step lowers each query's loss [Q, rows], and the last weights."""
    kind, options = OPTIMIZERS[name]
    parts = torch.ones(STEPS * MICRO, SAMPLES, requires_grad=True, dtype=torch.float64)
    work = copy.deepcopy(model)
    settings = [g | {"params": 1} for g in kind(groups(work), **options).param_groups for _ in g["params"]]
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    leaves = [w.clone() for w in weights]
    if name.startswith("adam"):
        counts = [len(list(g["params"])) for g in kind(groups(work), **options).param_groups]
        both = [
            {"params": leaves[: counts[0]], "lr": 1e-2},
            {"params": leaves[counts[0] :], "lr": 3e-2, "weight_decay": 0.3},
        ]
        optimizer = kind(both, differentiable=True, **options)
    state: dict = {}
    for step in range(STEPS):
        sums: list = [None] * len(leaves)
        for micro in range(MICRO):
            x, u, reached = batch(step, micro)
            by = parts[MICRO * step + micro][:, None] / SAMPLES / MICRO * u
            found = [by[:, :4].T @ x, by[:, :4].sum(0), by[:, 4:7].T @ x]
            found += [by[:, 7:].T @ x, by[:, 7:].sum(0)] if reached else [None, None]
            sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, found, strict=True)]
        norm = torch.sqrt(sum((g * g).sum() for g in sums if g is not None))
        factor = (CLIP / (norm + 1e-6)).clamp(max=1)
        clipped = [None if g is None else g * factor for g in sums]
        if name.startswith("adam"):
            for leaf, g in zip(leaves, clipped, strict=True):
                leaf.grad = g
            for group, lr in zip(optimizer.param_groups, (1e-2, 3e-2), strict=True):
                group["lr"] = lr * rate(step)
            optimizer.step()
        else:
            leaves = through_sgd(leaves, clipped, state, settings, rate(step))
    x, u, _ = query
    outputs = torch.cat([x @ leaves[0].T + leaves[1], x @ leaves[2].T, x @ leaves[3].T + leaves[4]], 1)
    of_queries = (outputs * u).sum(1)
    rows = [-torch.autograd.grad(of_queries[q], parts, retain_graph=True)[0].flatten() for q in range(len(x))]
    return torch.stack(rows), leaves


@pytest.fixture
def double():
    """Have steps be counted in float64: torch's differentiable Adam takes powers of their tensor."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which autograd goes through
def test_scores_are_autograds_through_ten_steps_of_the_optimizer(name: str, tmp_path, double) -> None:
    """Groups, a schedule, clipping, accumulation, decay, and a layer that some steps do not reach."""
    kind, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    model = Linear().double()
    before = copy.deepcopy(model)
    optimizer = kind(groups(model), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    with dropinf.record(model, dropinf.Identity(), optimizer, out=tmp_path) as run:
        for step in range(STEPS):
            optimizer.zero_grad()
            for micro in range(MICRO):
                run.samples(range(SAMPLES))
                losses(model, batch(step, micro)).mean().div(MICRO).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
    query = (torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 9, dtype=torch.float64), True)
    want, weights = effects_by_autograd(name, before, query)
    for p, w in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-12, atol=1e-14)
    assert min(run.step(i).clipped for i in range(STEPS)) < 0.9, "nothing was clipped"
    found = dropinf.Compressor.from_masks(run.masks, model, losses).compress([query])
    scores = dropinf.score(found, run, kind="adamw", curvature=False)
    assert (scores.values - want).abs().max() <= 1e-9 * want.abs().max()
    assert scores.ids == [str(i) for i in range(SAMPLES)] * (STEPS * MICRO)
    assert scores.steps.tolist() == [s for s in range(STEPS) for _ in range(SAMPLES * MICRO)]
    sums, ids = scores.by_id()
    assert ids == [str(i) for i in range(SAMPLES)]
    torch.testing.assert_close(sums, scores.values.view(2, -1, SAMPLES).sum(1))


def test_with_the_true_hessian_leaving_a_sample_out_of_a_step_is_foreseen(tmp_path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(56, 6, dtype=torch.float64), torch.randint(0, 3, (56,))
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    start, steps, kept = copy.deepcopy(model), 30, []
    generator = torch.Generator().manual_seed(0)
    order = [torch.randperm(48, generator=generator)[:16] for _ in range(steps)]

    def run(model: nn.Module, left_out: tuple[int, int] | None = None, record: bool = False):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        recording = dropinf.record(model, dropinf.Identity(), optimizer, out=tmp_path) if record else None
        with recording or torch.enable_grad():
            for step in range(steps):
                if recording:
                    recording.samples(order[step].tolist())
                    kept.append([p.detach().clone() for p in model.parameters()])
                share = torch.full((16,), 1 / 16, dtype=torch.float64)
                if left_out and left_out[0] == step:
                    share[left_out[1]] = 0
                optimizer.zero_grad()
                (F.cross_entropy(model(x[order[step]]), y[order[step]], reduction="none") * share).sum().backward()
                optimizer.step()
        return recording

    recorded = run(model, record=True)

    def product(step: int, vectors: Tensor) -> Tensor:
        names = [n for n, _ in model.named_parameters()]

        def loss(flat: Tensor) -> Tensor:
            sizes = [p.numel() for p in kept[step]]
            weights = [part.view(p.shape) for part, p in zip(flat.split(sizes), kept[step], strict=True)]
            out = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x[order[step]],))
            return F.cross_entropy(out, y[order[step]])

        return vectors @ torch.func.hessian(loss)(torch.cat([p.flatten() for p in kept[step]]))

    def of_queries(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(given[0]), given[1], reduction="none")

    asked = (x[48:], y[48:])
    query = dropinf.Compressor.from_masks(recorded.masks, model, of_queries).compress([asked])
    past = ((i, found) for i, _, found in recorded.backwards())
    scores = dict(effects(query.flat.double(), past, recorded.scale, None, product))
    base = of_queries(model, asked).detach()
    pairs = [(step, n) for step in range(6, steps, 4) for n in range(0, 16, 3)]  # the first are sign steps
    truth = []
    for pair in pairs:
        again = copy.deepcopy(start)
        run(again, left_out=pair)
        truth.append(of_queries(again, asked).detach() - base)
    foreseen = torch.stack([scores[step][:, n] for step, n in pairs])
    found = [spearmanr(foreseen[:, q], torch.stack(truth)[:, q]).statistic for q in range(8)]
    assert np.mean(found) >= 0.97


def test_curvature_that_would_overshoot_is_taken_implicitly() -> None:
    torch.manual_seed(0)
    rows, gradient, scale = torch.randn(7, 11).double(), torch.randn(3, 11).double(), torch.full((11,), 2.0).double()
    direct = torch.rand(11).double()
    for size in (1e-4, 1.0, 1e3, 1e9):
        curvature = Curvature(rows, torch.full((7,), size).double())
        found = bent(gradient, direct, curvature, scale)
        plain = (gradient * scale) @ rows.T @ rows * size
        if size < 1e-3:
            torch.testing.assert_close(found, plain)
            continue
        matrix = size * rows.T @ rows @ torch.diag(scale)
        want = torch.linalg.solve(torch.eye(11).double() + matrix @ torch.diag(direct), plain.T).T
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_scores_of_a_steep_run_are_finite(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    x, y = 30 * torch.randn(40, 6), torch.randint(0, 3, (40,))
    with dropinf.record(model, dropinf.Dropout(4), optimizer, out=tmp_path) as run:
        for _ in range(150):
            optimizer.zero_grad()
            run.samples(range(40))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    query = dropinf.Compressor.from_masks(run.masks, model, lambda m, b: F.cross_entropy(m(b), y, reduction="none"))
    for gamma in (1.0, 100.0):
        found = dropinf.score(query.compress([x]), run, kind="adamw", gamma=gamma)
        assert found.values.isfinite().all()
        assert math.isfinite(float(found.by_id()[0].abs().max()))


@pytest.mark.parametrize("step", [1, 2, 9])
def test_no_sample_turns_an_update_by_more_than_there_is_of_it(step: int) -> None:
    """Rows that cancel by chance leave Adam a derivative of up to 1 / eps; leaving one out turns the update once."""
    group = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "decoupled": 1.0}
    update = AdamUpdate(Columns([3], [0]), [group], [step])
    rows = torch.tensor([[1e-3, 1e-3, 1e-3], [-1e-3 + 1e-9, 2e-3, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    gradient, query = rows.sum(0), torch.tensor([[3.0, 2.0, 1.0], [-1.0, 0.5, 0.0]], dtype=torch.float64)

    def found(curvature) -> torch.Tensor:
        state = update.advance([torch.zeros(3).double()] * 2, gradient, None)
        past = Past(update, gradient, state, None, 1.0, rows)
        ((_, values),) = effects(query, iter([(0, past)]), torch.ones(3).double(), curvature)
        return values

    none = Curvature(torch.zeros(1, 3).double(), torch.zeros(1).double())
    most = 2 * 0.1 * 0.1 / (1 - 0.9**step) * ((1 - 0.999**step) / 0.001) ** 0.5 * query.abs().sum(1, keepdim=True)
    assert (found(lambda _: none).abs() <= most).all()
    assert (found(None).abs() > 100 * most)[:, :2].all()
    torch.testing.assert_close(found(lambda _: none)[:, 2], torch.zeros(2).double())
