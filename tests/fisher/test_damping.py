"""damping="auto": Ledoit and Wolf's shrinkage, against scikit-learn's and against what it is for."""

from __future__ import annotations

import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage

from dropinf.fisher import Fisher, FisherKind, build_fisher
from dropinf.fisher import damping as _damping
from dropinf.gradients import Gradients

KINDS: list[FisherKind] = ["block", "joint", "diagonal", "kronecker"]


def gradients(flat: torch.Tensor) -> Gradients:
    return Gradients(flat, {"w": (2, flat.shape[1] // 2)}, {"w": "a"})


def sample(n: int, k: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64) * torch.logspace(-0.5, 0.5, k)


def solved(fisher: Fisher, k: int) -> torch.Tensor:
    """The matrix that a Fisher solves with."""
    return torch.linalg.inv(fisher.solve(gradients(torch.eye(k, dtype=torch.float64))).flat)


TRAIN = {12: gradients(sample(40))}


@pytest.mark.parametrize("kind", ["block", "joint"])
def test_is_scikit_learns_shrinkage_with_an_unbiased_variance(kind):
    share = ledoit_wolf_shrinkage(TRAIN[12].flat.numpy(), assume_centered=True) * 40 / 39
    assert 0.05 < share < 0.95
    found = solved(build_fisher(TRAIN[12], kind, "auto"), 12)
    fisher = TRAIN[12].flat.T @ TRAIN[12].flat / 40
    mean = fisher.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(found, (1 - share) * fisher + share * mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 7, 40])
def test_keeps_the_mean_of_the_spectrum(kind, n):
    """However far a block is shrunk, its scores stay of the size of the others'."""
    train = gradients(sample(n))
    fisher = build_fisher(train, kind, "auto")
    torch.testing.assert_close(fisher.quadratic(train), (train.flat * fisher.solve(train).flat).sum(1))
    found = solved(fisher, 12)
    torch.testing.assert_close(found.trace(), train.flat.square().sum() / n, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [2, 7, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_does_not_depend_on_how_samples_come(kind, n):
    train = gradients(sample(n))
    whole = build_fisher(train, kind, "auto")
    parts = Fisher(kind, "auto").update(train[: n // 2]).merge(Fisher(kind, "auto").update(train[n // 2 :]))
    if kind == "kronecker":
        parts.correct(train)
    torch.testing.assert_close(parts.solve(train).flat, whole.solve(train).flat, rtol=1e-8, atol=1e-10)
    assert whole.quadratic(train).isfinite().all()


@pytest.mark.parametrize("kind", ["block", "diagonal", "kronecker"])
def test_more_samples_need_less(kind):
    fishers = [build_fisher(gradients(sample(n)), kind, "auto") for n in (5, 50, 5000)]
    spread = [float(torch.linalg.cond(solved(fisher, 12))) for fisher in fishers]
    if kind != "diagonal":  # whose few variances are known well from few samples
        assert spread[0] < spread[1] < spread[2]
    exact = build_fisher(gradients(sample(5000)), kind, 1e-6).quadratic(TRAIN[12]).mean()
    assert float(fishers[2].quadratic(TRAIN[12]).mean()) == pytest.approx(float(exact), rel=0.02)


def test_is_nearly_the_best_of_a_sweep():
    """F + lambda I, rescaled, is nearest to the true matrix: no lambda of a fine sweep is much nearer."""
    truth = torch.diag(torch.logspace(-1, 1, 12, dtype=torch.float64))
    chosen, best = [], []
    for seed in range(20):
        c = sample(15, seed=seed)
        fisher = c.T @ c / 15
        mean = float(fisher.diagonal().mean())
        value = _damping.ledoit_wolf(
            15, 12, mean, float(fisher.square().sum()), float(c.square().sum(1).square().sum())
        )
        distance = [shrunk(fisher, mean, v, truth) for v in (value, *torch.logspace(-3, 3, 200).tolist())]
        chosen.append(distance[0])
        best.append(min(distance))
    assert sum(chosen) / 20 < 1.15 * sum(best) / 20
    plain = sum(shrunk(sample(15, seed=s).T @ sample(15, seed=s) / 15, 1.0, 0.0, truth) for s in range(20))
    assert sum(chosen) < 0.8 * plain


def shrunk(fisher: torch.Tensor, mean: float, value: float, truth: torch.Tensor) -> float:
    estimate = (fisher + value * mean * torch.eye(12, dtype=torch.float64)) / (1 + value)
    return float((estimate - truth).square().sum())


@pytest.mark.parametrize("n", [7, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_another_damping_of_the_same_sums(kind, n):
    train = gradients(sample(n))
    fisher = build_fisher(train, kind, 0.5)
    before = fisher.solve(train).flat
    for damping in ("auto", 0.1):
        again = fisher.with_damping(damping)
        torch.testing.assert_close(again.solve(train).flat, build_fisher(train, kind, damping).solve(train).flat)
        again.update(train)
    torch.testing.assert_close(fisher.solve(train).flat, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"damping is -1; it must be a finite number"):
        fisher.with_damping(-1)


def test_one_sample_is_damped_to_dot_products():
    train = gradients(sample(1))
    dot = TRAIN[12].flat @ train.flat.T
    influence = build_fisher(train, "block", "auto").solve(TRAIN[12]).flat @ train.flat.T
    assert torch.corrcoef(torch.stack([dot.flatten(), influence.flatten()]))[0, 1] > 0.9999


def test_bad_input():
    with pytest.raises(ValueError, match='damping is "auto" and absolute is True'):
        Fisher("block", "auto", absolute=True)
    with pytest.raises(ValueError, match=r"damping is 'best'; it must be a finite number .* or \"auto\""):
        Fisher("block", "best")  # type: ignore[arg-type]
    assert repr(build_fisher(TRAIN[12], "block", "auto")) == "Fisher('block', damping=auto, 40 samples, 1 blocks, cpu)"
