"""Bad input gets an error that names the argument or layer, what it was, what it must be and the way out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dropinf

from .oracle import assert_equal_gradients, oracle


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def classifier():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def batches(count=3, size=4):
    return [(torch.randn(size, 5), torch.randint(0, 3, (size,))) for _ in range(count)]


def compress(model, data, loss, sketch=None, **options):
    return dropinf.Compressor(model, sketch or dropinf.Dropout(3), loss, **options).compress(data)


@pytest.mark.parametrize(
    ("bad_loss", "message"),
    [
        (
            lambda m, b: loss_fn(m, b).mean(),
            r"loss_fn must return a tensor of shape \[N\], it returned .* shape \[\].*reduction='none'",
        ),
        (lambda m, b: m(b[0]), r"shape \[4, 3\]"),
        (lambda m, b: float(loss_fn(m, b).sum()), "it returned float"),
        (
            lambda m, b: loss_fn(m, b).repeat(2),
            r"returned 8 losses for a batch whose tensors have leading sizes \[4\].*one loss per sample",
        ),
        (lambda m, b: loss_fn(m, b).long(), "floating-point losses, it returned torch.int64"),
        (
            lambda m, b: loss_fn(m, b).mean()[None],
            r"returned 1 losses for a batch .* leading sizes \[4\].*one loss per sample",
        ),
        (lambda m, b: None, "it returned NoneType.*reduction='none'"),
        (lambda m, b: list(loss_fn(m, b)), "it returned list"),
        (lambda m, b: loss_fn(m, b).detach(), "does not depend on any tracked layer.*no_grad"),
    ],
)
def test_losses(bad_loss, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        compress(classifier(), batches(), bad_loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sample", [1, 9])
@pytest.mark.parametrize(
    "sketch", [dropinf.Dropout(3), dropinf.Dropout(3, mode="flat"), dropinf.Identity(), dropinf.Gaussian(3)]
)
def test_non_finite_gradients_name_layer_and_sample(value, sample, sketch):
    """Also in the first batch, where the check that samples do not mix meets the NaN before."""
    data = batches()
    data[sample // 4][0][sample % 4] = value
    with pytest.raises(
        ValueError, match=rf"layer \S+: the gradient of sample {sample} is not finite.* 1 samples .*wider dtype"
    ):
        compress(classifier(), data, loss_fn, sketch)


@pytest.mark.parametrize("route", ["hook", "exact"])
def test_the_layer_that_is_not_finite_is_the_one_named(route):
    """A gradient that overflows in one layer alone, in a later batch of another size."""

    class Overflow(nn.Module):
        def __init__(self):
            super().__init__()
            self.sound, self.broken = nn.Linear(5, 4), nn.Linear(4, 4, bias=False)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            # The infinite factor meets one layer's gradient, and a loss of zero.
            poison = torch.where(x[:, :1] > 50, torch.inf, 1.0)
            h = self.sound(x)
            if route == "exact":
                return h * self.scale + (h.detach() * self.scale - (h * self.scale).detach()) * poison
            return h + (self.broken(h.detach()) - self.broken(h.detach()).detach()) * poison

    data = [torch.randn(4, 5), torch.randn(3, 5), torch.randn(4, 5)]
    data[1][2, 0] = 100.0
    name = "scale" if route == "exact" else "broken"
    with pytest.raises(ValueError, match=f"layer {name}: the gradient of sample 6 is not finite"):
        compress(Overflow(), data, lambda m, x: m(x).nan_to_num().sum(1), dropinf.Identity())


@pytest.mark.parametrize("sketch", [dropinf.PCA(2), dropinf.Dropout(2, sampling="energy")], ids=["pca", "energy"])
def test_non_finite_calibration(sketch):
    data = batches()
    compressor = dropinf.Compressor(classifier(), sketch, loss_fn)
    data[2][0][1] = float("nan")
    with pytest.raises(
        ValueError, match=r"layer \S+: calibration met .* not finite \(NaN or inf\) in sample 9;.*again"
    ):
        compressor.calibrate(data)
    data[2][0][1] = 0.0
    compressor.calibrate(data)
    assert bool(compressor.compress(data).flat.isfinite().all())


@pytest.mark.parametrize("dim", [0, -3, 2.5, True, (4, 0), "8"])
def test_dim(dim):
    for sketch in (dropinf.Dropout, dropinf.Gaussian, dropinf.PCA, dropinf.SJLT, dropinf.Rademacher):
        with pytest.raises(ValueError, match="dim must be a whole number of at least 1, got"):
            sketch(dim)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep must be a fraction in \(0, 1\] or None, got 0.0"),
        ({"keep": 1.5}, "got 1.5"),
        ({"keep": -0.1}, "got -0.1"),
        ({"keep": float("nan")}, "got nan"),
        ({"keep": "half"}, "got 'half'"),
        ({"dim": 0}, "dim must be a whole number of at least 1, got 0"),
        ({"dim": (2, 3, 4)}, r"dim must be an int or a pair \(out, in\), got \(2, 3, 4\)"),
        ({"group": 0}, "group must be a whole number of at least 1, got 0"),
        ({"sampling": "best"}, "sampling must be 'uniform' or 'energy', got 'best'"),
        ({"mode": "round"}, "mode must be 'factorized' or 'flat', got 'round'"),
        ({"mode": "flat", "sampling": "energy"}, "use mode='factorized'"),
    ],
)
def test_dropout_options(options, message):
    with pytest.raises(ValueError, match=message):
        dropinf.Dropout(**{"dim": 4, **options})


def test_masks_of_another_model(tmp_path):
    path = tmp_path / "masks"
    dropinf.Compressor(classifier(), dropinf.Dropout(3), loss_fn).save(path)
    wider = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="of another model: layer 0 is 6 x 7 here and 6 x 5 there; load the masks"):
        dropinf.Compressor(wider, dropinf.Dropout(3), loss_fn).load(path)
    with pytest.raises(ValueError, match=r"of another model: layer 2: this model does not track it"):
        dropinf.Compressor(nn.Sequential(nn.Linear(5, 6)), dropinf.Dropout(3), loss_fn).load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"not a file of masks that Compressor\.save wrote"):
        dropinf.Compressor(wider, dropinf.Dropout(3), loss_fn).load(path)


def test_empty_loader():
    for data in ([], iter(())):
        with pytest.raises(ValueError, match="batches: it is empty"):
            compress(classifier(), data, loss_fn)
        with pytest.raises(ValueError, match="batches: it is empty"):
            dropinf.Compressor(classifier(), dropinf.PCA(2), loss_fn).calibrate(data)


@pytest.mark.parametrize("other", [dropinf.Dropout(3, seed=1), dropinf.Dropout(2), dropinf.Gaussian(3)])
def test_gradients_of_different_sketches(other):
    model, data = classifier(), batches()
    train, query = compress(model, data, loss_fn), compress(model, data, loss_fn, other)
    fisher = dropinf.build_fisher(train)
    with pytest.raises(ValueError, match=r"query and train differ: layer '0' .*Compress both with the same Compressor"):
        dropinf.score(query, train, fisher)
    with pytest.raises(ValueError, match=r"(?s)Compressor"):
        dropinf.self_influence(query, fisher)


def test_gradients_of_another_model():
    data = batches()
    train = compress(classifier(), data, loss_fn)
    query = compress(nn.Sequential(nn.Linear(5, 3)), data, loss_fn)
    message = "layer '2' is in train but missing from query. Compress both with the same Compressor"
    with pytest.raises(ValueError, match=message):
        dropinf.score(query, train, kind="dot")
    with pytest.raises(ValueError, match=r"fisher and train differ: layer '2' .* missing from train"):
        dropinf.self_influence(query, dropinf.build_fisher(train))
    with pytest.raises(ValueError, match=r"parts\[0\] and parts\[1\] differ: layer '2'"):
        dropinf.Gradients.cat([train, query])


@pytest.mark.parametrize(("kind", "where"), [("block", "'0'"), ("joint", "'all layers'")])
def test_singular_fisher_without_damping(kind, where):
    train = compress(classifier(), batches(), loss_fn, dropinf.Identity())
    fisher = dropinf.build_fisher(train, kind=kind, damping=0.0)
    message = f"layer {where}: the Fisher matrix of N=12 samples .* singular .* damping=0; .* damping=0.1"
    with pytest.raises(ValueError, match=message):
        dropinf.score(train, train, fisher)
    with pytest.raises(ValueError, match=message):
        dropinf.self_influence(train, fisher)


@pytest.mark.parametrize("meta_model", [True, False])
def test_model_and_data_on_different_devices(meta_model):
    model, data = classifier(), batches(1)
    if meta_model:
        model = model.to("meta")
    else:
        data = [tuple(t.to("meta") for t in data[0])]
    with pytest.raises(ValueError, match=r"batch: its tensors are on \w+ and the model is on \w+; move one of them"):
        compress(model, data, loss_fn)


def test_layers_that_match_nothing():
    with pytest.raises(
        ValueError, match=r"layers: 'decoder.*' matches no module or parameter.*its modules are 0, 1, 2"
    ):
        compress(classifier(), batches(), loss_fn, layers="decoder.*")
    with pytest.raises(ValueError, match=r"layers: .*Conv2d.* matches no module"):
        compress(classifier(), batches(), loss_fn, layers=nn.Conv2d)
    with pytest.raises(ValueError, match="layers: 'encoder' matches no module"):
        compress(classifier(), batches(), loss_fn, layers=["0", "encoder"])
    with pytest.raises(ValueError, match="layers: it is empty; name at least one module, or pass None"):
        compress(classifier(), batches(), loss_fn, layers=[])
    for wrong, what in ((5, "5"), (["0", 7], "7"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(TypeError, match=f"layers: it must be name patterns or module types.*got {what}"):
            compress(classifier(), batches(), loss_fn, layers=wrong)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
        self.q_proj, self.norm = nn.Linear(5, 3), nn.LayerNorm(3)


@pytest.mark.parametrize(
    ("layers", "hint"),
    [
        ("encodr.0", r"did you mean 'encoder\.0'"),
        ("encodr.*", "did you mean 'encoder'"),
        ("*.q_prj", "did you mean 'q_proj'"),
        ("q_proj.wieght", r"did you mean 'q_proj\.weight'"),
        ("proj", r"did you mean '\*proj\*'\?"),
        ("Linear", r"to pick modules by their type, pass the type itself, torch\.nn\.modules\.linear\.Linear"),
        (nn.RMSNorm, "did you mean LayerNorm"),
        ("*.wieght", r"did you mean 'encoder\.0\.weight'"),
        ("??", "; its modules are encoder"),
        ("zzz", "; its modules are encoder"),
    ],
)
def test_the_nearest_names(layers, hint):
    with pytest.raises(ValueError, match=rf"layers: .* matches no module or parameter of this model(; )?{hint}"):
        dropinf.Compressor(Nested(), dropinf.Dropout(3), loss_fn, layers=layers)


def test_statistics_are_needed_first():
    for sketch in (dropinf.PCA(2), dropinf.Dropout(2, sampling="energy")):
        with pytest.raises(RuntimeError, match=r"needs statistics.*call compressor\.calibrate\(batches\) first"):
            compress(classifier(), batches(), loss_fn, sketch)
    with pytest.raises(ValueError, match=r"batches: .* reads them twice; pass a list or a DataLoader"):
        dropinf.compress(classifier(), iter(batches()), loss_fn, dropinf.PCA(2))


def test_an_empty_batch():
    with pytest.raises(ValueError, match=r"batches: a batch has no samples.*leave empty batches out"):
        compress(classifier(), [*batches(1), *batches(1, size=0)], loss_fn)


def test_arguments_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got type"):
        dropinf.Compressor(nn.Linear, dropinf.Dropout(2), loss_fn)
    with pytest.raises(TypeError, match=r"sketch must be a dropinf sketch .*, got <class"):
        dropinf.Compressor(classifier(), dropinf.Dropout, loss_fn)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        dropinf.Compressor(lambda x: x, dropinf.Dropout(2), loss_fn)
    with pytest.raises(TypeError, match=r"sketch must be a dropinf sketch such as dropinf\.Dropout\(64\), got 64"):
        dropinf.Compressor(classifier(), 64, loss_fn)
    with pytest.raises(TypeError, match=r"loss_fn must be a function \(model, batch\) -> losses \[N\], got None"):
        dropinf.Compressor(classifier(), dropinf.Dropout(2), None)
    with pytest.raises(ValueError, match="model: nothing to track"):
        dropinf.Compressor(nn.ReLU(), dropinf.Dropout(2), loss_fn)


def test_documents_and_losses_must_agree():
    cu = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="returned 4 losses for the 2 documents of cu_seqlens"):
        compress(classifier(), batches(), loss_fn, cu_seqlens=lambda _: cu)


def one_batch():
    return batches(1)[0]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: one_batch()[0], r"it is one batch, a tensor of shape \[4, 5\], whose rows .* pass \[batch\]"),
        (one_batch, r"it is one batch, a tuple of tensor \[4, 5\], tensor \[4\]; .* pass \[batch\]"),
        (lambda: (*one_batch(), None), r"it is one batch, a tuple of .*, NoneType; "),
        (lambda: dict(zip("xy", one_batch(), strict=True)), "it is one batch, a dict of 'x', 'y'; .* pass"),
        (lambda: "train", r"it is str; it must be an iterable of batches, .* pass \[batch\]"),
        (lambda: None, "it is NoneType; it must be an iterable of batches"),
        (lambda: 3, "it is int; it must be an iterable of batches"),
    ],
)
def test_one_batch_instead_of_several(make, what, tmp_path):
    model, plain = classifier(), dropinf.Compressor(classifier(), dropinf.Dropout(3), loss_fn)
    calibrated = dropinf.Compressor(model, dropinf.PCA(2), loss_fn)
    uses = [
        plain.compress,
        calibrated.calibrate,
        lambda b: plain.compress(b, out=tmp_path / "idx"),
        lambda b: dropinf.compress(model, b, loss_fn, dropinf.PCA(2)),
        lambda b: dropinf.choose(model, b, loss_fn, budget_bytes=400),
    ]
    for use in uses:
        with pytest.raises(TypeError, match=f"batches: {what}"):
            use(make())


def test_tensors_that_are_one_batch():
    x = torch.randn(4, 5)
    for data in (list(one_batch()), (x, x)):
        what = rf"batches: it is a {type(data).__name__} of tensors, each of which was taken for a batch, and \w+Error"
        with pytest.raises(ValueError, match=rf"{what} was raised: .*; if they are one batch, pass \[batch\]"):
            compress(classifier(), data, loss_fn)
    for data in (x.split(2), (x, x[:3]), [x, x], (b for b in [x]), [x, x[:2]], ((x,), (x,)), [[x, x]]):
        rows = compress(classifier(), data, lambda m, b: m(b if isinstance(b, torch.Tensor) else b[0]).sum(1))
        assert len(rows) >= 4
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):  # as the model says it
        compress(classifier(), [torch.randn(4, 6)] * 2, lambda m, b: m(b).sum(1))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(3, 3)
        self.mixer = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

    def forward(self, x):
        return self.last((self.first(x).to(self.mixer.dtype) @ self.mixer).abs())


def test_complex_parameters():
    message = r"model: its parameter mixer is complex \(torch\.complex64\).* name the others in layers=.*two real"
    for model in (Complex(), Complex().requires_grad_(False)):
        with pytest.raises(ValueError, match=message):
            dropinf.Compressor(model, dropinf.Dropout(3), loss_fn)
    model, data = Complex(), (torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,)))
    model.first.double()
    model.last.double()
    model.mixer = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
    for options in ({"layers": ["first", "last"]}, {}):
        model.mixer.requires_grad_(False)
        expected = oracle(model, loss_fn, data, 4)
        model.mixer.requires_grad_(bool(options))
        compressor = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn, **options)
        assert_equal_gradients(compressor, compressor.compress([data]), expected)


def loaders():
    data = TensorDataset(*one_batch())
    weighted = WeightedRandomSampler([1.0] * 4, 4)
    return {
        "shuffle": DataLoader(data, 2, shuffle=True),
        "subset": DataLoader(data, 2, sampler=SubsetRandomSampler(range(4))),
        "batch_sampler": DataLoader(data, batch_sampler=BatchSampler(weighted, 2, drop_last=False)),
        "in order": DataLoader(data, 2),
        "own batches": DataLoader(data, batch_sampler=[[0, 1], [2, 3]]),
    }


@pytest.mark.parametrize("name", loaders())
def test_a_loader_that_shuffles(name, recwarn):
    model, loader = classifier(), loaders()[name]
    assert len(compress(model, loader, loss_fn)) == 4
    said = [str(w.message) for w in recwarn if "shuffl" in str(w.message)]
    if name in ("in order", "own batches"):
        assert not said
    else:
        assert len(said) == 1
        assert said[0].startswith("batches: a shuffling DataLoader, so rows stand in an order that nothing keeps")
        assert "shuffle=False" in said[0]
        assert "ids=" in said[0]
    dropinf.Compressor(model, dropinf.PCA(2), loss_fn).calibrate(loader)  # in any order
    dropinf.choose(model, loader, loss_fn, budget_bytes=400)
    assert len([w for w in recwarn if "shuffl" in str(w.message)]) == len(said)


def test_a_batch_that_was_computed_under_autograd():
    outside = torch.ones(4, requires_grad=True)
    batches = [torch.randn(5, 4) * outside for _ in range(2)]
    compressor = dropinf.Compressor(nn.Linear(4, 3), dropinf.Dropout(2), lambda m, x: m(x).square().sum(1))
    with pytest.raises(RuntimeError, match=r"batches: a tensor in one was computed from others .* detach it"):
        compressor.compress(batches)
