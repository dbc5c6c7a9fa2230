"""LogIX (logix-ai 0.1.1): its logs, Hessians and influence scores of gradients that dropinf compressed."""

from __future__ import annotations

import copy
import importlib
from importlib.metadata import PackageNotFoundError

import logix
import pytest
import torch
import torch.nn.functional as F
from logix.config import LoggingConfig, LoRAConfig
from sklearn.datasets import load_digits
from torch import nn

import dropinf
from dropinf.interop import logix as adapter

# Its hooks on the first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """It writes into the working directory."""
    monkeypatch.chdir(tmp_path)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def digits(kind="mlp"):
    """A model that classifies digits, and them in float64."""
    data = load_digits()
    x, y = torch.from_numpy(data.data) / 16, torch.from_numpy(data.target)
    torch.manual_seed(0)
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    elif kind == "cnn":
        x = x.view(-1, 1, 8, 8)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, stride=2, padding=1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
    else:

        class Rows(nn.Sequential):
            def forward(self, x):
                return super().forward(x).mean(1)

        x = x.view(-1, 8, 8)
        model = Rows(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 10))
    return model.double().eval(), x, y


def batches_of(x, y, size=16):
    return list(zip(x.split(size), y.split(size), strict=True))


def collect(run, model, batches, *, hessian="raw", lora="none", masks=None):
    """LogIX's own loop over the training set."""
    for _ in logix.LogIXScheduler(run, lora=lora, hessian=hessian, save="grad"):
        done = 0
        for x, y in batches:
            ids = [str(i) for i in range(done, done + len(x))]
            done += len(x)
            with run(data_id=ids, mask=None if masks is None else masks(x)):
                loss_fn(model, (x, y)).sum().backward()
                model.zero_grad()
    run.finalize()
    run.eval()


def query_log(run, model, x, y):
    run.setup({"grad": ["log"]})
    with run(data_id=[f"q{i}" for i in range(len(x))]):
        loss_fn(model, (x, y)).sum().backward()
    return run.get_log(copy=True)


def scores_of(run, model, x, y, **options):
    """Its influence of every training sample on each query, in the order of the samples."""
    found = run.compute_influence_all(query_log(run, model, x, y), run.build_log_dataloader(), **options)
    order = torch.tensor([int(i) for i in found["tgt_ids"]]).argsort()
    return found["influence"][:, order]


def error_of(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("hessian", ["none", "raw", "kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["mlp", "rows", "cnn"])
def test_uncompressed_scores_are_logixs(kind, hessian, record):
    scores = {}
    for name in ("theirs", "ours"):
        model, x, y = digits(kind)
        run = logix.LogIX(f"{kind}-{name}")
        run.watch(model)
        if name == "ours":
            adapter.compress(run, dropinf.Identity())
        collect(run, model, batches_of(x[:48], y[:48]), hessian=hessian)
        scores[name] = scores_of(run, model, x[100:104], y[100:104], precondition=hessian != "none")
        own = run.compute_self_influence(query_log(run, model, x[100:104], y[100:104]), precondition=hessian != "none")
        scores[name] = torch.cat([scores[name], own["influence"][:, None]], 1)
    error = error_of(scores["ours"], scores["theirs"])
    record(
        "logix-ai", f"digits {kind}, uncompressed: its influence and self-influence, hessian {hessian}", agreement=error
    )
    assert error < 1e-5


SKETCHES = {
    "dropout": dropinf.Dropout(6),
    "runs": dropinf.Dropout((2, 4), group=2),
    "flat": dropinf.Dropout(12, mode="flat"),
    "gaussian": dropinf.Gaussian(6),
}


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


@pytest.mark.parametrize("hessian", ["raw", "kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["rows", "cnn"])
def test_hessians_are_those_of_the_compressed_space(kind, hessian):
    """Against the formulas, on gradients and factors from plain autograd in float64."""
    model, x, y = digits(kind)
    x, y, qx, qy = x[:48], y[:48], x[100:103], y[100:103]
    run = logix.LogIX("digits")
    run.watch(model)
    compressor = adapter.compress(run, dropinf.Dropout(5))
    collect(run, model, batches_of(x, y), hessian=hessian)
    got = scores_of(run, model, qx, qy)

    model, *_ = digits(kind)  # the hooks of a run stay on its model
    batch = torch.cat([x, qx]), torch.cat([y, qy])
    c = dropinf.Compressor(
        model, dropinf.Dropout(5), loss_fn, layers=[f"{n}.weight" for n in compressor.layers]
    ).compress([batch])
    factors = factors_of(model, compressor, x, y)
    want, damping = 0, None
    for name, layer in reversed(c.layers.items()):
        train, query = layer[:48], layer[48:]
        if hessian == "raw":
            cov = train.flatten(1).T @ train.flatten(1) / 48
            cov += 0.1 * cov.diagonal().mean() * torch.eye(len(cov))
            want = want + query.flatten(1) @ torch.linalg.inv(cov) @ train.flatten(1).T
            continue
        a, g = (torch.linalg.eigh(f.flatten(0, 1).T @ f.flatten(0, 1) / 48) for f in factors[name])
        rotated = [g.eigenvectors.T @ c @ a.eigenvectors for c in (train, query)]
        values = torch.outer(g.eigenvalues, a.eigenvalues) if hessian == "kfac" else rotated[0].square().mean(0)
        damping = 0.1 * values.mean() if damping is None else damping  # the last layer's, for all of them
        want = want + ((rotated[1] / (values + damping)).flatten(1) @ rotated[0].flatten(1).T)
    assert error_of(got, want) < 1e-6


def factors_of(model, compressor, x, y):
    """Layer -> what the masks leave of its inputs and output gradients, [n, t, k] each."""
    seen, handles = {}, []
    for name in compressor.layers:

        def keep(module, args, out, name=name):
            seen[name] = args[0].detach(), out
            out.retain_grad()

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    loss_fn(model, (x, y)).sum().backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, plan in compressor.layers.items():
        module, (a, out) = model.get_submodule(name), seen[name]
        g = out.grad
        if isinstance(module, nn.Conv2d):
            a = F.unfold(a, module.kernel_size, padding=module.padding, stride=module.stride).mT
            g = g.flatten(2).mT
        rows, columns = plan.out_axis.index[0].long(), plan.in_axis.index[0].long()
        a, g = a[..., columns], g[..., rows]
        found[name] = (a, g) if a.ndim == 3 else (a[:, None], g[:, None])
    return found


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


def graph_of(loss):
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [child for child, _ in node.next_functions]
    return seen


def tensors_of(node):
    """What a node of the graph keeps: saved tensors, and those of a hook's closure."""
    cells = getattr(getattr(node, "call", None), "__closure__", None) or ()
    found = [getattr(node, n) for n in dir(node) if n.startswith("_saved_")] + [cell.cell_contents for cell in cells]
    return [t for t in found if isinstance(t, torch.Tensor)]


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


def test_what_does_not_fit_is_one_line():
    model, x, y = digits()
    run = logix.LogIX("empty")
    with pytest.raises(ValueError, match=r"^run: it watches no module; call run\.watch\(model\) first$"):
        adapter.compress(run, dropinf.Dropout(6))

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    other = nn.Sequential(Odd(64, 10)).double()
    run.watch(other)
    with pytest.raises(ValueError, match=r"^compress: module 0 \(Odd\) is not a linear layer or convolution[^\n]*$"):
        adapter.compress(run, dropinf.Dropout(6))

    run = logix.LogIX("lora")
    run.watch(model)
    adapter.compress(run, dropinf.Dropout(6))
    with pytest.raises(ValueError, match=r'^compress: module 0\.logix_lora_B [^\n]*leave lora at "none"$'):
        collect(run, model, batches_of(x[:16], y[:16]), lora="random")

    model, x, y = digits()
    run = logix.LogIX("flat")
    run.watch(model)
    compressor = adapter.compress(run, dropinf.Dropout(6, mode="flat"))
    with pytest.raises(ValueError, match=r'^compress: module 0 has no single input factor[^\n]*"raw"$'):
        collect(run, model, batches_of(x[:16], y[:16]), hessian="kfac")
    with pytest.raises(ValueError, match=r"^compress: its compressor has no loss[^\n]*$"):
        compressor.compress([(x[:4], y[:4])])


def test_wrong_version_and_missing_package_are_one_line(monkeypatch):
    monkeypatch.setattr("dropinf.interop.version", lambda name: "0.2.0")
    with pytest.raises(
        ImportError,
        match=r"^logix-ai is 0\.2\.0; this adapter reaches into that of 0\.1\.1: pip install logix-ai==0\.1\.1$",
    ):
        importlib.reload(adapter)

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("dropinf.interop.version", missing)
    with pytest.raises(ImportError, match=r"^logix-ai is not installed; run: pip install logix-ai==0\.1\.1$"):
        importlib.reload(adapter)


@pytest.mark.parametrize("dim", [16, 64, 256])
def test_speed_and_memory_beside_its_lora(dim, compare):
    class Pooled(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean(1)

    torch.manual_seed(0)
    model = Pooled(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)).eval()
    x, y = torch.randn(8, 128, 768), torch.randint(768, (8,))
    ours, theirs = logix.LogIX("ours"), logix.LogIX("theirs")
    models = copy.deepcopy(model), copy.deepcopy(model)
    ours.watch(models[0])
    adapter.compress(ours, dropinf.Dropout(dim))
    theirs.watch(models[1])
    theirs.add_lora(lora_config=LoRAConfig(rank=dim))

    def step(run, model):
        def job():
            run.setup({"grad": ["log"]})
            with run(data_id=list("abcdefgh")):
                loss_fn(model, (x, y)).sum().backward()

        return job

    jobs = step(ours, models[0]), step(theirs, models[1])
    compare(
        "logix-ai",
        f"768 -> 3072 -> 768, 8 x 128 positions, mask {dim}x{dim} against LoGra",
        *jobs,
        rounds=7,
    )
    want = dropinf.Compressor(model, dropinf.Dropout(dim), loss_fn, layers=["0.weight", "2.weight"]).compress([(x, y)])
    got = ours.get_log()[1]
    assert all(error_of(got[name]["grad"], want[name]) < 1e-5 for name in ("0", "2"))
