"""The measures against scipy's and scikit-learn's, and against cases whose answer is known."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score

from dropinf import metrics


@pytest.mark.parametrize("tied", [False, True])
def test_correlations_are_scipys(tied):
    x, y = torch.randn(4, 30), torch.randn(4, 30)
    if tied:
        x, y = (2 * x).round(), y.round()
    for q in range(4):
        rank = scipy.stats.spearmanr(x[q], y[q]).statistic
        assert metrics.spearman(x, y)[q].item() == pytest.approx(rank, abs=1e-12)
        assert metrics.pearson(x, y)[q].item() == pytest.approx(scipy.stats.pearsonr(x[q], y[q]).statistic, abs=1e-6)
        assert metrics.ranks(x)[q].tolist() == scipy.stats.rankdata(x[q]).tolist()


def test_a_constant_correlates_with_nothing():
    assert metrics.spearman(torch.ones(3), torch.arange(3.0)) == 0


def test_subsets():
    subsets = metrics.sample_subsets(11, 40, fraction=0.3, seed=1)
    assert subsets.sum(1).tolist() == [3] * 40
    assert len(subsets.unique(dim=0)) > 20
    assert torch.equal(subsets, metrics.sample_subsets(11, 40, fraction=0.3, seed=1))
    assert not torch.equal(subsets, metrics.sample_subsets(11, 40, fraction=0.3, seed=2))


def test_lds_of_a_model_that_is_additive():
    """Where losses are minus the sum of true effects, true effects score 1, their negatives -1, and noise nothing."""
    effects, subsets = torch.randn(5, 40), metrics.sample_subsets(40, 60)
    losses = 3 - (effects @ subsets.float().T).T
    assert metrics.lds(effects, subsets, losses).value == pytest.approx(1)
    assert metrics.lds(-effects, subsets, losses).value == pytest.approx(-1)
    noisy = metrics.lds(effects + torch.randn(5, 40), subsets, losses)
    assert 0.4 < noisy.low < noisy.value < noisy.high < 0.95
    assert metrics.lds(torch.randn(5, 40), subsets, losses).low < 0.2
    want = [scipy.stats.spearmanr(subsets.float() @ effects[q], -losses[:, q]).statistic for q in range(5)]
    assert metrics.lds(effects, subsets, losses).per_query.tolist() == pytest.approx(want)


def test_interval_covers_and_shrinks():
    torch.manual_seed(3)
    truth = torch.randn(400, 60)
    few = metrics.agreement(truth[:20] + torch.randn(20, 60), truth[:20])
    many = metrics.agreement(truth + torch.randn(400, 60), truth)
    assert few.low < many.value < few.high
    assert many.high - many.low < 0.4 * (few.high - few.low)
    standard_error = many.per_query.std().item() / 20
    assert many.high - many.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert str(many) == f"{many.value:.3f} [{many.low:.3f}, {many.high:.3f}]"


def test_leave_one_out():
    changes = torch.randn(3, 20)
    assert metrics.leave_one_out(2 * changes + 1, changes).value == pytest.approx(1)
    scores = torch.randn(3, 20)
    want = sum(scipy.stats.pearsonr(scores[q], changes[q]).statistic for q in range(3)) / 3
    assert metrics.leave_one_out(scores, changes).value == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("digits", [1, 8])
def test_mislabel_auc_is_scikit_learns(digits):
    values = torch.randn(200).round(decimals=digits)
    flipped = torch.rand(200) < 0.2
    assert metrics.mislabel_auc(values, flipped) == pytest.approx(roc_auc_score(flipped, values), abs=1e-12)


def test_brittleness_of_a_vote():
    """Query q is right while more of its own samples than two are left: removing its proponents breaks it."""
    owner = torch.arange(30) % 3

    def retrain(kept):
        return torch.tensor([int(kept[owner == q].sum()) > 2 for q in range(3)])

    good = (owner == torch.arange(3)[:, None]).float()
    found = metrics.brittleness(good, retrain, [2, 7, 8])
    assert {count: e.value for count, e in found.items()} == {2: 0, 7: 0, 8: 1}
    assert metrics.brittleness(-good, retrain, [8])[8].value == 0


def test_tail_patch():
    gain = torch.randn(3, 20)
    before = torch.randn(3)
    found = metrics.tail_patch(gain, before, lambda indices: before - gain[:, indices].sum(1), 4)
    assert found.per_query.tolist() == pytest.approx(gain.topk(4).values.sum(1).tolist(), abs=1e-5)


S, MASKS = torch.zeros(2, 5), torch.ones(3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.lds(S, MASKS[:, :4], torch.zeros(3, 2)), r"subsets is torch.bool \[3, 4\]; .*N, 5"),
        (lambda: metrics.lds(S, MASKS.float(), torch.zeros(3, 2)), r"subsets is torch.float32 \[3, 5\]"),
        (
            lambda: metrics.lds(S, MASKS, torch.zeros(2, 3)),
            r"losses has shape \[2, 3\]; it must be \[M, Q\] = \[3, 2\]",
        ),
        (lambda: metrics.lds(S, MASKS, torch.full((3, 2), float("nan"))), "not finite"),
        (lambda: metrics.agreement(S, S[:1]), r"scores has shape \[2, 5\] and reference \[1, 5\]"),
        (lambda: metrics.leave_one_out(S, S[:1]), r"changes has shape \[1, 5\]"),
        (lambda: metrics.mislabel_auc(S[0], torch.zeros(5)), "flipped is torch.float32"),
        (lambda: metrics.mislabel_auc(S[0], MASKS[0]), "flipped marks 5 of 5 samples"),
        (lambda: metrics.sample_subsets(5, 3, fraction=1.0), "fraction must lie between 0 and 1, got 1.0"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
