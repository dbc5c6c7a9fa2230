"""LogIX (logix-ai 0.1.1): its logs hold the gradients that dropinf compressed, in one process and in another."""

from __future__ import annotations

import logix
import pytest
import torch
from logix.config import LoggingConfig
from torch import nn

import dropinf
from dropinf.interop import logix as adapter
from tests.interop.logix.models import (
    SKETCHES,
    batches_of,
    collect,
    digits,
    error_of,
    graph_of,
    loss_fn,
    scores_of,
    tensors_of,
)

# Its hooks on the first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("kind", ["mlp", "rows", "cnn"])
def test_logged_gradients_are_the_compressors(kind, sketch):
    model, x, y = digits(kind)
    batches = batches_of(x[:48], y[:48])
    layers = [f"{name}.weight" for name, m in model.named_modules() if hasattr(m, "weight")]
    want = dropinf.Compressor(model, SKETCHES[sketch], loss_fn, layers=layers).compress(batches)
    run = logix.LogIX("digits")
    run.watch(model)
    adapter.compress(run, SKETCHES[sketch])
    collect(run, model, batches)
    got = adapter.gradients(run)
    got.check_same_sketch(want)
    assert run.build_log_dataset().data_id_list == [str(i) for i in range(48)]
    assert error_of(got.flat, want.flat) < 1e-12
    assert all(log["grad"].ndim == 2 for log in run.build_log_dataset()[0][1].values())


def test_calibrated_masks_come_as_a_compressor():
    model, x, y = digits()
    batches = batches_of(x[:48], y[:48])
    compressor = dropinf.Compressor(model, dropinf.Dropout(4, rank=8, whiten=True), loss_fn, layers=["0", "2"])
    compressor.calibrate(batches)
    want = compressor.compress(batches)
    run = logix.LogIX("digits")
    run.watch(model)
    assert adapter.compress(run, compressor) is compressor
    collect(run, model, batches)
    got = adapter.gradients(run)
    assert all(error_of(got[name], want[name]) < 1e-12 for name in ("0", "2"))


def test_a_mask_of_positions_goes_before_the_sketch():
    covariances = {}
    for name in ("theirs", "ours"):
        model, x, y = digits("rows")
        run = logix.LogIX(name)
        run.watch(model)
        if name == "ours":
            compressor = adapter.compress(run, dropinf.Dropout(5))
        collect(run, model, batches_of(x[:48], y[:48]), hessian="kfac", masks=lambda x: (x.sum(-1) > 2).double())
        covariances[name] = run.state.get_covariance_state()
    for name, plan in compressor.layers.items():
        for side, axis in {"forward": plan.in_axis, "backward": plan.out_axis}.items():
            kept = axis.index[0].long()
            want = covariances["theirs"][name][side][kept[:, None], kept]
            assert error_of(covariances["ours"][name][side], want) < 1e-12


def test_only_the_sketched_input_is_kept():
    model, x, y = digits()
    run = logix.LogIX("digits")
    run.watch(model)
    adapter.compress(run, dropinf.Dropout(6))
    run.setup({"grad": ["log"]})
    with run(data_id=["0", "1"]):
        loss = loss_fn(model, (x[:2], y[:2])).sum()
        kept = {tuple(t.shape) for node in graph_of(loss) for t in tensors_of(node)}
        loss.backward()
    assert (2, 6) in kept
    assert (2, 64) not in kept


def test_a_module_called_twice_adds_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x):
            return self.head(torch.relu(self.inner(torch.relu(self.inner(x)))))

    _, x, y = digits()
    torch.manual_seed(0)
    model = Twice().double()
    want = dropinf.Compressor(model, dropinf.Dropout(6), loss_fn, layers=["inner.weight", "head.weight"]).compress(
        [(x[:8], y[:8])]
    )
    run = logix.LogIX("twice")
    run.watch(model)
    adapter.compress(run, dropinf.Dropout(6))
    collect(run, model, [(x[:8], y[:8])])
    assert error_of(adapter.gradients(run).flat, want.flat) < 1e-12


@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE")
def test_logs_of_another_process_are_read(record, monkeypatch):
    """Train gradients and Hessian from files, new queries, and the same scores from dropinf."""
    model, x, y = digits()
    run = logix.LogIX("digits")
    run.watch(model)
    adapter.compress(run, dropinf.Dropout(6))
    collect(run, model, batches_of(x[:48], y[:48]))
    want = scores_of(run, model, x[100:104], y[100:104])

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    model, x, y = digits()
    later = logix.LogIX("digits")
    later.watch(model)
    adapter.compress(later, dropinf.Dropout(6))
    later.initialize_from_log()
    got = scores_of(later, model, x[100:104], y[100:104])
    assert torch.equal(got, want)
    train = adapter.gradients(later)
    compressor = dropinf.Compressor(digits()[0], dropinf.Dropout(6), loss_fn, layers=["0.weight", "2.weight"])
    query = compressor.compress([(x[100:104], y[100:104])])
    ours = dropinf.score(query, train, dropinf.build_fisher(train, "block", 0.1))
    record(
        "logix-ai",
        "digits mlp, mask 6x6: its influence from log files against dropinf.score",
        agreement=error_of(ours, want),
    )
    assert error_of(ours, want) < 1e-5


def test_convolutions_that_logix_itself_does_not_log():
    """One-dimensional and grouped ones, whose gradients it refuses or gets wrong."""
    model = nn.Sequential(nn.Conv1d(8, 6, 3, padding=1), nn.Unflatten(1, (6, 1)), nn.Conv2d(6, 4, (1, 3), groups=2))
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(24, 10)).double()
    _, x, y = digits("rows")
    names = ["0.weight", "2.weight", "4.weight"]
    want = dropinf.Compressor(model, dropinf.Dropout(4), loss_fn, layers=names).compress([(x[:8], y[:8])])
    run = logix.LogIX("convolutions")
    run.watch(model)
    adapter.compress(run, dropinf.Dropout(4))
    collect(run, model, [(x[:8], y[:8])], hessian="raw")
    assert error_of(adapter.gradients(run).flat, want.flat) < 1e-12
    with pytest.raises(ValueError, match=r'^compress: module 2 has no single input factor[^\n]*"raw"$'):
        collect(run, model, [(x[:8], y[:8])], hessian="kfac")


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("none", torch.float64)])
def test_logs_have_the_runs_dtype(name, dtype):
    model, x, y = digits()
    run = logix.LogIX("digits", logging_config=LoggingConfig(log_dtype=name))
    run.watch(model)
    adapter.compress(run, dropinf.Dropout(6))
    collect(run, model, batches_of(x[:16], y[:16]), hessian="none")
    assert adapter.gradients(run).dtype == dtype
