"""Gradients on disk: everything that takes Gradients gives the same of an Index; runs resume; what is wrong is said."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf.compressor import unwrap
from dropinf.index import read_ahead, verify
from dropinf.masks import fingerprint
from dropinf.storage import Codec

KINDS = ("block", "joint", "diagonal", "kronecker")


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_batches(count: int = 9, seed: int = 1, rows: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows + i % 3, 12, generator=generator).double(),
            torch.randint(4, (rows + i % 3,), generator=generator),
        )
        for i in range(count)
    ]


def names(batch):
    return [f"é{float(x):.6f}" for x in batch[0][:, 0]]


def make_compressor(seed: int = 0, **options) -> dropinf.Compressor:
    return dropinf.Compressor(make_model(seed), dropinf.Dropout(6, **options), loss_fn)


@pytest.fixture(scope="module")
def train():
    return make_compressor().compress(make_batches())


@pytest.fixture(scope="module")
def query():
    return make_compressor().compress(make_batches(2, 9))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_compressor().compress(
        make_batches(), out=tmp_path_factory.mktemp("index") / "idx", ids=names, fisher="block"
    )


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def test_an_index_holds_what_compress_returns(index, train):
    assert torch.equal(index[:].flat, train.flat)
    assert (index.shapes, dict(index.digest), len(index), index.dtype) == (
        train.shapes,
        dict(train.digest),
        len(train),
        train.dtype,
    )
    assert index.bytes_per_sample == train.bytes_per_sample
    assert index.verify() == []


@pytest.mark.parametrize(
    "rows",
    [
        3,
        -1,
        slice(2, 40, 7),
        slice(5, 2),
        slice(None, None, -1),
        [4, 0, 4, -2],
        [],
        torch.tensor([31, 7]),
        np.array([8, 1]),
    ],
)
def test_samples_are_selected_as_from_gradients(index, train, rows):
    expected = train.flat[[rows]] if isinstance(rows, int) else torch.from_numpy(train.flat.numpy()[rows].copy())
    assert torch.equal(index[rows].flat, expected)


def test_a_mask_selects_samples(index, train):
    mask = torch.arange(len(train)) % 3 == 1
    assert torch.equal(index[mask].flat, train.flat[mask])
    assert index.ids(mask) == [index.ids()[i] for i in mask.nonzero().flatten().tolist()]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (99, IndexError, "sample 99 is out of range for 54 samples"),
        ([0, -55], IndexError, "sample -55 is out of range"),
        (torch.ones(3, dtype=torch.bool), IndexError, r"a mask of shape \(3,\) selects from 54 samples"),
        ([0.5], IndexError, "whole numbers"),
        ("0.weight", TypeError, "by samples, not by layer '0.weight'"),
    ],
)
def test_samples_that_are_not_there(index, rows, error, message):
    with pytest.raises(error, match=message):
        index[rows]


@pytest.mark.parametrize("rows", [1, 4, 5, 11, 1000])
def test_blocks_cover_every_sample_in_order(index, train, rows):
    parts = list(index.blocks(rows))
    assert [offset for offset, _ in parts] == np.cumsum([0, *(len(p) for _, p in parts)])[:-1].tolist()
    assert max(len(p) for _, p in parts) <= rows
    assert torch.equal(torch.cat([p.flat for _, p in parts]), train.flat)
    stored = list(index.stored_blocks(rows))
    assert torch.equal(torch.cat([x.values for _, x in stored]), train.flat)
    with pytest.raises(ValueError, match="rows is 0"):
        next(index.blocks(0))


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_ranks_are_the_whole(index, train, world):
    found = torch.zeros_like(train.flat)
    for rank in range(world):
        for offset, part in index.share(rank, world).blocks(4):
            assert not found[offset : offset + len(part)].any()
            found[offset : offset + len(part)] = part.flat
    assert torch.equal(found, train.flat)


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_and_scores_are_those_of_memory(index, train, query, kind, tmp_path):
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)  # noqa: E731
    fisher, expected = dropinf.build_fisher(index, kind), dropinf.build_fisher(train, kind)
    close(fisher.solve(query).flat, expected.solve(query).flat)
    close(dropinf.self_influence(index, fisher), dropinf.self_influence(train, expected))
    for score_kind in ("influence", "dot", "cosine", "relative"):
        whole = dropinf.score(query, train, expected, kind=score_kind)
        close(dropinf.score(query, index, fisher, kind=score_kind), whole)
        for largest in (True, False):
            best = dropinf.score(query, index, fisher, kind=score_kind, top=5, largest=largest)
            values, order = whole.sort(dim=1, descending=largest, stable=True)
            close(best.values, values[:, :5])
            assert torch.equal(best.indices, order[:, :5])
        mapped = dropinf.score(query, index, fisher, kind=score_kind, out=tmp_path / "scores.npy")
        close(mapped, whole)
        close(torch.from_numpy(np.load(tmp_path / "scores.npy")), whole)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.npy"]
    close(dropinf.score(index, train, expected), dropinf.score(train, train, expected))  # as queries too


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-7), (torch.bfloat16, 2e-3), (torch.float16, 3e-4), (torch.int8, 0.015)]
)
def test_stored_dtypes(train, query, dtype, error, tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", dtype=dtype)
    decoded = index[:].flat.double()
    assert 0 < (decoded - train.flat).norm() / train.flat.norm() < error
    # Scores from stored rows are those of the decoded ones.
    kept = dropinf.Gradients(decoded, train.shapes, train.digest)
    fisher = dropinf.build_fisher(kept)
    small = query.to(torch.float32)
    for kind in ("influence", "dot", "cosine", "relative"):
        expected = dropinf.score(query, kept, fisher, kind=kind)
        tolerance = 2e-5 * expected.abs().max().item()
        for queries in (query, small):
            found = dropinf.score(queries, index, fisher, kind=kind).double()
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
            best = dropinf.score(queries, index, fisher, kind=kind, top=4)
            torch.testing.assert_close(best.values.double(), expected.topk(4).values, rtol=0, atol=tolerance)


def test_scales_hold_rows_and_layers_of_any_size():
    torch.manual_seed(0)
    flat = torch.randn(6, 7, dtype=torch.float64) * torch.tensor([1e-12, 1e-6, 1, 1e3, 1e9, 0]).double().unsqueeze(1)
    half = Codec("float16", (7,), (1.0,))
    kept = half.encode(flat)
    assert torch.allclose(half.decode(kept["gradients"], kept["scale"]).double(), flat, rtol=1e-3, atol=0)
    # One layer a million times smaller than its neighbour keeps its own seven bits.
    flat[:, 3:] *= 1e-6
    int8 = Codec("int8", (3, 4), (1.0, 1e-6))
    kept = int8.encode(flat)
    back = int8.decode(kept["gradients"], kept["scale"]).double()
    for columns in (slice(0, 3), slice(3, 7)):
        error = (back - flat)[:5, columns].norm(dim=1) / flat[:5, columns].norm(dim=1)
        assert error.max() < 0.05
    assert not back[5].any()


def test_ids(index, tmp_path):
    assert index.ids() == [name for batch in make_batches() for name in names(batch)]
    assert index.ids([7, 0]) == [index.ids()[7], index.ids()[0]]
    plain = make_compressor().compress(make_batches(2), out=tmp_path / "idx")
    assert plain.ids([3, 10]) == ["3", "10"]


def test_the_fisher_of_the_same_pass_is_kept(index, train, query, tmp_path):
    expected = dropinf.build_fisher(train)
    torch.testing.assert_close(index.fisher().solve(query).flat, expected.solve(query).flat)
    made = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher=dropinf.Fisher("kronecker", "auto"))
    kept = dropinf.Index.open(tmp_path / "idx").fisher()
    assert (kept.kind, kept.damping, kept.count) == ("kronecker", "auto", len(train))
    torch.testing.assert_close(
        kept.solve(query).flat, dropinf.build_fisher(train, "kronecker", "auto").solve(query).flat
    )
    made.save_fisher(expected)
    assert torch.equal(dropinf.Index.open(tmp_path / "idx").fisher().solve(query).flat, expected.solve(query).flat)
    assert made.verify() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [11, 54])
def test_a_fisher_goes_on_after_a_file(train, query, kind, rows, tmp_path):
    """Both as rows (N < K) and as a Gram sum; more can be added to what was read."""
    fisher = dropinf.build_fisher(train[:rows], kind)
    digest = fisher.save(tmp_path / "fisher")
    read = dropinf.Fisher.load(tmp_path / "fisher")
    torch.testing.assert_close(read.solve(query).flat, fisher.solve(query).flat, rtol=1e-12, atol=1e-12)
    assert read.save(tmp_path / "again") == digest
    both = (fisher.update(train[3:20]), read.update(train[3:20]))
    found, expected = (f.with_damping("auto").solve(query).flat for f in both[::-1])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_fisher_file_that_is_none(tmp_path, train):
    train.save(tmp_path / "gradients")
    with pytest.raises(ValueError, match=r"gradients: not a file of the kind 'dropinf.fisher-1'"):
        dropinf.Fisher.load(tmp_path / "gradients")
    (tmp_path / "short").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="short: truncated or damaged"):
        dropinf.Fisher.load(tmp_path / "short")
    with pytest.raises(FileNotFoundError):
        dropinf.Fisher.load(tmp_path / "none")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [11, 54])
@pytest.mark.parametrize("damping", [1e-3, "auto"])
def test_whitened_rows_have_scores_as_products(train, query, kind, rows, damping):
    fisher = dropinf.build_fisher(train[:rows], kind, damping)
    white = fisher.whiten(query).flat @ fisher.whiten(train).flat.T
    torch.testing.assert_close(white, dropinf.score(query, train, fisher), rtol=1e-8, atol=1e-9)


def test_an_export_is_exact(index, train, query, tmp_path):
    fisher, expected = index.fisher(), dropinf.score(query, train, dropinf.build_fisher(train))
    queries = fisher.whiten(query).flat
    index.whitened(tmp_path / "rows.npy")
    index.whitened(tmp_path / "rows.safetensors", fisher)
    for rows in (torch.from_numpy(np.load(tmp_path / "rows.npy")), load_file(tmp_path / "rows.safetensors")["rows"]):
        torch.testing.assert_close(queries @ rows.T, expected)
    index.whitened(tmp_path / "rows.faiss")
    values, found = faiss.read_index(str(tmp_path / "rows.faiss")).search(queries.float().numpy(), 6)
    best = dropinf.score(query, index, fisher, top=6)
    assert np.array_equal(found, best.indices.numpy())
    np.testing.assert_allclose(values, best.values, rtol=1e-4)
    with pytest.raises(ValueError, match=r"out is .*rows.txt.*must end in .npy, .safetensors or .faiss"):
        index.whitened(tmp_path / "rows.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.faiss", "rows.npy", "rows.safetensors"]


class StopError(Exception):
    pass


def interrupted(batches, at):
    """A list whose batch `at` is never reached."""

    class Batches(list):
        def __getitem__(self, b):
            if b == at:
                raise StopError
            return super().__getitem__(b)

    return Batches(batches)


@pytest.mark.parametrize("at", [1, 4, 70, 139])
def test_an_interrupted_run_goes_on(at, tmp_path):
    """140 batches make shards of three: stopped within one, and between two."""
    batches = make_batches(140, rows=1)
    make_compressor().compress(batches, out=tmp_path / "whole", fisher="block", ids=names)
    with pytest.raises(StopError):
        make_compressor().compress(interrupted(batches, at), out=tmp_path / "idx", fisher="block", ids=names)
    with pytest.raises(ValueError, match="not finished; run the same compress again"):
        dropinf.Index.open(tmp_path / "idx")
    assert any("not finished" in line for line in verify(tmp_path / "idx"))
    calls = []

    def counted(model, batch):
        calls.append(len(batch[0]))
        return loss_fn(model, batch)

    again = dropinf.Compressor(make_model(), dropinf.Dropout(6), counted)
    assert again.compress(batches, out=tmp_path / "idx", fisher="block", ids=names).verify() == []
    assert len(calls) == 140 - at  # and no batch twice
    assert files(tmp_path / "idx") == files(tmp_path / "whole")
    calls.clear()
    again.compress(batches, out=tmp_path / "idx", fisher="block", ids=names)
    assert not calls
    assert files(tmp_path / "idx") == files(tmp_path / "whole")


def test_a_deleted_shard_is_made_again(index, tmp_path):
    made = make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=names, fisher="block")
    before = files(made.path)
    lost = sorted((made.path / "shards").iterdir())[4]
    lost.unlink()
    assert made.verify() == [f"{lost}: missing; restore it, or run the same compress again to make it"]
    make_compressor().compress(make_batches(), out=made.path, ids=names)
    assert files(made.path) == before


def test_batches_of_any_kind_give_the_same_files(tmp_path):
    x, y = torch.randn(50, 12).double(), torch.randint(4, (50,))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    make_compressor().compress(list(loader), out=tmp_path / "list")
    make_compressor().compress(loader, out=tmp_path / "loader")
    assert files(tmp_path / "list") == files(tmp_path / "loader")
    streamed = make_compressor().compress(iter(loader), out=tmp_path / "iterator")  # of unknown length: larger shards
    assert torch.equal(streamed[:].flat, dropinf.Index.open(tmp_path / "list")[:].flat)
    with pytest.raises(ValueError, match="shuffling DataLoader gives another order each time"):
        make_compressor().compress(DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True), out=tmp_path / "no")


def test_appended_batches_follow(train, query, tmp_path):
    more = make_batches(3, 5)
    both = dropinf.Gradients.cat([train, make_compressor().compress(more)])
    for _ in range(2):  # the second time finds everything there
        make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=names, fisher="block")
        index = make_compressor().compress(more, out=tmp_path / "idx", ids=names, append=True, fisher="block")
        assert torch.equal(index[:].flat, both.flat)
        torch.testing.assert_close(index.fisher().solve(query).flat, dropinf.build_fisher(both).solve(query).flat)
        assert index.verify() == []
    lost = sorted((index.path / "shards").iterdir())[2]
    kept = lost.read_bytes()
    lost.unlink()
    make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=names)
    assert lost.read_bytes() == kept


def test_an_interrupted_append_leaves_the_index(train, tmp_path):
    more = make_batches(6, 5)
    make_compressor().compress(make_batches(), out=tmp_path / "idx")
    with pytest.raises(StopError):
        make_compressor().compress(interrupted(more, 3), out=tmp_path / "idx", append=True)
    assert torch.equal(dropinf.Index.open(tmp_path / "idx")[:].flat, train.flat)
    with pytest.raises(ValueError, match=r"batches: .*idx was begun with others \(6 of them, and 2 now"):
        make_compressor().compress(make_batches(2, 8), out=tmp_path / "idx", append=True)
    index = make_compressor().compress(more, out=tmp_path / "idx", append=True)
    assert len(index) == len(train) + sum(len(b[0]) for b in more)


def test_statistics_come_with_the_index(tmp_path):
    first = make_compressor(sampling="energy")
    first.calibrate(make_batches(3, 7))
    index = first.compress(make_batches(), out=tmp_path / "idx")
    later = make_compressor(sampling="energy")
    later.load(index.path / "sketch.safetensors")
    assert torch.equal(later.compress(make_batches()).flat, index[:].flat)
    assert torch.equal(later.moments("0")["in"], first.moments("0")["in"])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: make_compressor(1), {}, "out: .* other weights of the model"),
        (lambda: make_compressor(seed=0, group=2), {}, "out: .* another sketch of layer '0'"),
        (make_compressor, {"dtype": torch.int8}, "dtype is torch.int8; .* holds float64"),
        (make_compressor, {"ids": None}, "ids: .* begun with ids"),
        (make_compressor, {"dtype": torch.int32}, "dtype is torch.int32; it must be one of torch.float64"),
        (make_compressor, {"ids": lambda batch: ["a"]}, r"ids: it gave \['a'\]... for a batch of 5 samples"),
        (make_compressor, {"ids": lambda batch: list(range(5))}, "it must give 5 strings"),
    ],
)
def test_what_does_not_belong_is_refused(make, options, message, tmp_path):
    if "it " not in message:  # the rest is wrong in a new index too
        make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=names)
    with pytest.raises(ValueError, match=message):
        make().compress(make_batches(), out=tmp_path / "idx", **{"ids": names, **options})


def test_the_fingerprint_is_of_what_is_learned():
    """Wrappers, and caches that a forward renews, are not."""
    model = make_model()
    before = fingerprint(model)
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    assert fingerprint(model) == before
    model.cache += 1
    assert fingerprint(unwrap(torch.compile(model))) == before
    model.register_buffer("mean", torch.zeros(2))
    assert fingerprint(model) != before
    with torch.no_grad():
        model[0].bias[3] += 1e-9
    changed = fingerprint(model)
    model.mean += 1
    assert len({before, changed, fingerprint(model), fingerprint(make_model(1))}) == 4


def test_bad_arguments(index, train, tmp_path):
    compressor = make_compressor()
    with pytest.raises(ValueError, match="batches: it is empty"):
        compressor.compress([], out=tmp_path / "idx")
    with pytest.raises(ValueError, match="batches: it is empty"):
        compressor.compress(iter([]), out=tmp_path / "idx")
    with pytest.raises(ValueError, match="out is None; dtype, fisher, ids, append and group are of an index"):
        compressor.compress(make_batches(), ids=names)
    with pytest.raises(ValueError, match="fisher has 54 samples; pass an empty one"):
        compressor.compress(make_batches(), out=tmp_path / "idx", fisher=dropinf.build_fisher(train))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"no index and not empty \(it has 'thesis.tex'\)"):
        compressor.compress(make_batches(), out=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no index"):
        dropinf.Index.open(tmp_path / "other")
    with pytest.raises(ValueError, match="memory_bytes is 100; 32 rows of this index alone take"):
        dropinf.Index.open(index.path, memory_bytes=100)
    with pytest.raises(ValueError, match="holds others' gradients; pass append=True"):
        compressor.compress(make_batches(2, 8), out=index.path, ids=names)
    with pytest.raises(ValueError, match="out is for the whole matrix"):
        dropinf.score(train, index, kind="dot", top=3, out=tmp_path / "scores.npy")
    with pytest.raises(FileNotFoundError, match="no Fisher matrix in it"):
        make_compressor().compress(make_batches(2), out=tmp_path / "idx").fisher()


def test_a_sample_that_is_not_finite_is_named_by_its_batch(tmp_path):
    batches = make_batches()
    batches[4][0][2, 0] = float("nan")
    with pytest.raises(ValueError, match="gradient of sample 2 of batch 4 is not finite"):
        make_compressor().compress(batches, out=tmp_path / "idx")


def test_reading_ahead_keeps_order_and_errors():
    def read(job):
        if job == 3:
            raise OSError("gone")
        return 10 * job

    assert list(read_ahead(read, iter([1, 2]))) == [10, 20]
    with pytest.raises(OSError, match="gone"):
        list(read_ahead(read, iter([1, 3, 2])))
