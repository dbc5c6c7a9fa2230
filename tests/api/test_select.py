"""Selections, checkpoints, and rows that are an optimizer's updates."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def batch(seed: int, n: int = 8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 7, generator=generator, dtype=torch.float64), torch.randint(0, 5, (n,), generator=generator)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def trained(net: nn.Module, steps: int = 5) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.8, 0.95))
    for step in range(steps):
        optimizer.zero_grad()
        losses(net, batch(step)).mean().backward()
        optimizer.step()
    return optimizer


def test_the_best_samples_are_selected_with_reasons() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0, 4.0], [1.0, 1.0, 8.0, 4.0]])
    found = dropinf.select(scores, budget=3, ids=["a", "b", "c", "d"])
    assert found.ids == ["c", "d", "b"]
    assert found.scores.tolist() == [5.0, 4.0, 3.0]
    assert found.reasons[0] == "rank 1 of 4, score +5, most of queries 1, 0"
    assert dropinf.select(scores.mean(0), keep=0.5).ids == ["2", "3"]


def test_a_diverse_selection_leaves_out_what_is_alike() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.0, 1.0]])
    gradients = dropinf.Gradients(rows, {"x": (2,)}, {"x": "0" * 32})
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert dropinf.select(scores, budget=2).ids == ["0", "1"]
    found = dropinf.select(scores, budget=2, diversity=0.5, gradients=gradients)
    assert found.ids == ["0", "2"]
    assert "cosine 0.00 to the nearest" in found.reasons[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass one of them"),
        ({"keep": 0.5, "budget": 1}, "pass one of them"),
        ({"keep": 0.0}, "keep is 0.0"),
        ({"budget": 9}, "budget is 9"),
        ({"budget": 1, "ids": ["a"]}, "ids has 1 names"),
        ({"budget": 1, "diversity": 2.0}, "diversity is 2.0"),
        ({"budget": 1, "diversity": 0.5}, "gradients: diversity needs"),
    ],
)
def test_bad_selections(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        dropinf.select(torch.ones(4), **options)
    with pytest.raises(ValueError, match="not finite"):
        dropinf.select(torch.tensor([1.0, float("nan")]), budget=1)


def recorded(tmp_path):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with dropinf.record(net, dropinf.Dropout(4), optimizer, out=tmp_path) as run:
        for _ in range(6):
            optimizer.zero_grad()
            run.samples(f"sample {i}" for i in range(8))
            losses(net, batch(0)).mean().backward()
            optimizer.step()
    return dropinf.Compressor.from_masks(run.masks, net, losses).compress([batch(9)]), run


def test_a_run_is_selected_from(tmp_path) -> None:
    query, run = recorded(tmp_path)
    found = dropinf.select(run, target=query, keep=0.25)
    sums, ids = dropinf.score(query, run, kind="adamw").by_id()
    best = sums.mean(0).argsort(descending=True)[:2].tolist()
    assert found.ids == [ids[i] for i in best]
    with pytest.raises(ValueError, match="target: a recorded run"):
        dropinf.select(run, keep=0.25)


def test_a_diverse_selection_of_a_run_goes_by_names(tmp_path) -> None:
    query, run = recorded(tmp_path)
    names = [f"sample {i}" for i in (5, 0, 7, 2, 1, 6, 3, 4)]
    net = model()
    rows = dropinf.Compressor.from_masks(run.masks, net, losses).compress(
        [tuple(x[[5, 0, 7, 2, 1, 6, 3, 4]] for x in batch(0))]
    )
    straight = dropinf.Compressor.from_masks(run.masks, net, losses).compress([batch(0)])
    options = {"target": query, "keep": 0.5, "diversity": 0.5}
    found = dropinf.select(run, gradients=rows, ids=names, **options)
    want = dropinf.select(run, gradients=straight, ids=[f"sample {i}" for i in range(8)], **options)
    assert found.ids == want.ids
    with pytest.raises(ValueError, match="pass ids with gradients"):
        dropinf.select(run, gradients=rows, **options)
    with pytest.raises(ValueError, match="are not those of the run's"):
        dropinf.select(run, gradients=rows, ids=range(8), **options)
    with pytest.raises(TypeError, match="scores is list"):
        dropinf.select([1.0, 2.0], keep=0.5)


def test_checkpoints_are_weighted_sums_of_scores_and_leave_the_model() -> None:
    net, states = model(), []
    for steps in (1, 4):
        other = model()
        trained(other, steps)
        states.append(copy.deepcopy(other.state_dict()))
    before = copy.deepcopy(net.state_dict())
    sketch, train, query = dropinf.Dropout(4), [batch(1), batch(2)], [batch(3, 3)]
    want = 0
    for state, weight in zip(states, (0.5, 2.0), strict=True):
        other = model()
        other.load_state_dict(state)
        compressor = dropinf.Compressor(other, sketch, losses)
        want = want + weight * dropinf.score(compressor.compress(query), compressor.compress(train), kind="dot")
    found = dropinf.Checkpoints(net, states, [0.5, 2.0]).score(sketch, losses, query, train)
    torch.testing.assert_close(found, want)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    mean = dropinf.Checkpoints(net, states).score(sketch, losses, query, train, fisher="block", damping=0.1)
    assert mean.shape == (3, 16)
    with pytest.raises(ValueError, match="weights has 1 numbers"):
        dropinf.Checkpoints(net, states, [1.0])
    with pytest.raises(ValueError, match="states: it is empty"):
        dropinf.Checkpoints(net, [])
    with pytest.raises(ValueError, match="train: it is an iterator"):
        dropinf.Checkpoints(net, states).score(sketch, losses, query, iter(train))
    with pytest.raises(ValueError, match="weights: some are not finite"):
        dropinf.Checkpoints(net, states, [1.0, float("nan")])
    with pytest.raises(ValueError, match="holds the model's own weights"):
        dropinf.Checkpoints(net, [net.state_dict()])
    with pytest.raises(TypeError, match="must be a state dictionary"):
        dropinf.Checkpoints(net, [net])
    shuffled = DataLoader(TensorDataset(*batch(1)), 4, shuffle=True)
    with pytest.raises(ValueError, match="train: it is a loader that shuffles"):
        dropinf.Checkpoints(net, states).score(sketch, losses, query, shuffled)


def test_preconditioned_rows_are_adams_updates(tmp_path) -> None:
    net = model()
    optimizer = trained(net)
    sketch = dropinf.Dropout(4)
    plain = dropinf.Compressor(net, sketch, losses)
    less = dropinf.Compressor(net, sketch, losses, preconditioner=optimizer)
    rows = less.compress([batch(1)])
    for i in range(8):
        step = copy.deepcopy((net, optimizer))
        one, again = step[0], torch.optim.AdamW(step[0].parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group in again.param_groups:
            group["weight_decay"] = 0
        before = [p.detach().clone() for p in one.parameters()]
        again.zero_grad()
        losses(one, batch(1))[i].backward()
        again.step()
        updates = dict(
            zip(
                (n for n, _ in one.named_parameters()),
                [(b - p) / 1e-2 for b, p in zip(before, one.parameters(), strict=True)],
                strict=True,
            )
        )
        for name, layer in less.layers.items():
            want = layer.compress_exact(updates[layer.parameter][None].detach())[0]
            torch.testing.assert_close(rows[name][i], want, rtol=1e-5, atol=1e-8)
    assert less.loss_name() != plain.loss_name()
    query = plain.compress([batch(2)])
    assert dropinf.score(query, rows, kind="cosine").shape == (8, 8)
    index = less.compress([batch(1)], out=tmp_path / "idx")
    torch.testing.assert_close(dropinf.score(query, index, kind="dot"), dropinf.score(query, rows, kind="dot"))
    for bad, message in (
        ({"preconditioner": torch.optim.SGD(net.parameters(), 0.1)}, "it must be an Adam"),
        ({"preconditioner": torch.optim.Adam(net.parameters())}, "has no state"),
        ({"preconditioner": optimizer, "sketch": dropinf.Gaussian(4)}, "mixes coordinates"),
        ({"preconditioner": torch.optim.AdamW(net.parameters(), maximize=True)}, "its maximize is True"),
        ({"preconditioner": torch.optim.AdamW(net.parameters(), amsgrad=True)}, "its amsgrad is True"),
        ({"preconditioner": torch.optim.Adam(net.parameters(), weight_decay=0.1)}, "its weight_decay is 0.1"),
    ):
        options = {"sketch": sketch} | bad
        with pytest.raises(ValueError, match=message):
            dropinf.Compressor(net, options.pop("sketch"), losses, **options).compress([batch(1)])


def test_one_score_a_sample_over_all_queries() -> None:
    net = model()
    compressor = dropinf.Compressor(net, dropinf.Dropout(4), losses)
    train, query = compressor.compress([batch(1), batch(2)]), compressor.compress([batch(3)])
    fisher = dropinf.build_fisher(train)
    for kind in ("influence", "dot", "cosine", "relative"):
        whole = dropinf.score(query, train, fisher, kind=kind)
        torch.testing.assert_close(dropinf.score(query, train, fisher, kind=kind, reduce="mean"), whole.mean(0))
        torch.testing.assert_close(dropinf.score(query, train, fisher, kind=kind, reduce="max"), whole.amax(0))
    for options in ({"reduce": "median"}, {"reduce": "mean", "top": 3}):
        with pytest.raises(ValueError, match="reduce must be one of mean, max"):
            dropinf.score(query, train, fisher, **options)


@pytest.mark.parametrize("kind", ["adamw", "tracin"])
def test_one_score_a_sample_of_a_run_over_all_queries(kind: str, tmp_path) -> None:
    query, run = recorded(tmp_path)
    whole, one = (dropinf.score(query, run, kind=kind, reduce=reduce) for reduce in (None, "mean"))
    torch.testing.assert_close(one.values, whole.values.mean(0))
    assert (one.ids, one.steps.tolist()) == (whole.ids, whole.steps.tolist())
    torch.testing.assert_close(one.by_id()[0], whole.by_id()[0].mean(0))
    assert dropinf.select(one, keep=0.3).ids == dropinf.select(whole, keep=0.3).ids


def test_the_most_harmful_samples_of_a_step_are_dropped(tmp_path) -> None:
    """Half of the labels are wrong; what is dropped are mostly these, and the step is of the others."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    x, y = batch(0, 64)
    y = (x[:, 0] > 0).long()
    wrong = torch.arange(64) % 2 == 0
    given = torch.where(wrong, 1 - y, y)
    share = 0
    with dropinf.record(net, dropinf.Dropout(4), optimizer, out=tmp_path) as run:
        for _ in range(12):
            compressor = dropinf.Compressor.from_masks(run.masks, copy.deepcopy(net), losses)
            target = compressor.compress([(x[32:], y[32:])])
            optimizer.zero_grad()
            run.samples(range(64))
            losses(net, (x, given)).mean().backward()
            out = run.drop(target, 0.3)
            kept = torch.ones(64, dtype=torch.bool)
            kept[out] = False
            share = float(wrong[out].float().mean()) if len(out) else share
            optimizer.zero_grad()
            run.samples(kept.nonzero().flatten())
            losses(net, (x[kept], given[kept])).mean().backward()
            optimizer.step()
        with pytest.raises(ValueError, match=r"part is 1.5"):
            run.drop(target, 1.5)
    assert len(run) == 12
    assert 44 < len(run.ids(11)) < 64
    assert share > 0.8
