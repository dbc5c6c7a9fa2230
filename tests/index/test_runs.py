"""Runs into an index: interrupted ones go on, others are added, and what does not belong is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import dropinf
from dropinf.capture.identity import fingerprint
from dropinf.index import verify
from dropinf.workload import unwrap
from tests.index.small import files, loss_fn, make_batches, make_compressor, make_model, names


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
    calls: list[int] = []

    def counted():
        model = make_model()
        model.register_forward_hook(lambda _, args, _out: calls.append(len(args[0])))
        return dropinf.Compressor(model, dropinf.Dropout(6), loss_fn, audit="never")

    counted().compress(batches, out=tmp_path / "whole", fisher="block", ids=names)
    with pytest.raises(StopError):
        counted().compress(interrupted(batches, at), out=tmp_path / "idx", fisher="block", ids=names)
    calls.clear()
    with pytest.raises(ValueError, match="not finished; run the same compress again"):
        dropinf.Index.open(tmp_path / "idx")
    assert any("not finished" in line for line in verify(tmp_path / "idx"))
    again = counted()
    assert again.compress(batches, out=tmp_path / "idx", fisher="block", ids=names).verify() == []
    again_computed = 1 if at == 1 else 2  # the first and the last that were finished: their rows show the loss
    computed = [0, at - 1, *range(at, 140)]
    followed = len({len(batches[b][0]) for b in computed} - {1})  # once for each shape, to see whether samples can meet
    assert len(calls) == 140 - at + again_computed + followed
    assert files(tmp_path / "idx") == files(tmp_path / "whole")
    calls.clear()
    again.compress(batches, out=tmp_path / "idx", fisher="block", ids=names)
    assert calls == [len(batches[0][0]), len(batches[-1][0])]
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


def test_a_sample_that_is_not_finite_is_named_by_its_batch(tmp_path):
    batches = make_batches()
    batches[4][0][2, 0] = float("nan")
    with pytest.raises(ValueError, match="gradient of sample 2 of batch 4 is not finite"):
        make_compressor().compress(batches, out=tmp_path / "idx")
