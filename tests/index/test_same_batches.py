"""A resume, a rerun and an append compare every batch: with fingerprints and ids, and the first and the last by rows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import dropinf
from dropinf.files import checksum
from dropinf.index.writer import Writer
from tests.index.small import files, loss_fn, make_batches, make_model, names
from tests.index.test_runs import StopError, interrupted

COUNT = 9


def compressor(loss=loss_fn, model=None):
    return dropinf.Compressor(model or make_model(), dropinf.Dropout(6), loss)


def changed(b: int):
    """The batches, of which one has another value."""
    batches = make_batches()
    batches[b][0][1, 3] += 1e-6
    return batches


def begun(folder, at: int, append: bool = False, **options):
    """An index whose run, or an append to it, was stopped at a batch."""
    if append:
        compressor().compress(make_batches(3, 5), out=folder, **options)
    with pytest.raises(StopError):
        compressor().compress(interrupted(make_batches(), at), out=folder, append=append, **options)


def of_kind(kind: str, batches):
    """A list, what can be iterated over again, or only once."""

    class Again:
        def __iter__(self):
            return iter(batches)

    return {"list": batches, "again": Again(), "once": iter(batches)}[kind]


KINDS = pytest.mark.parametrize("kind", ["list", "again", "once"])


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("b", [0, 1, 4, 5])
def test_a_resume_with_other_data_is_refused(append, b, tmp_path):
    begun(tmp_path / "idx", 6, append)
    before = files(tmp_path / "idx")
    message = (
        f"batch {b} is another than the one whose rows are in" if b else "was begun with others .* the first differs"
    )
    with pytest.raises(ValueError, match=message):
        compressor().compress(changed(b), out=tmp_path / "idx", append=append)
    assert files(tmp_path / "idx") == before
    index = compressor().compress(changed(7), out=tmp_path / "idx", append=append)  # which was not computed yet
    rows = compressor().compress(changed(7)).flat
    assert torch.equal(index[-len(rows) :].flat, rows)


@KINDS
@pytest.mark.parametrize("b", [1, 5, 8])
def test_a_rerun_with_other_data_is_refused(kind, b, tmp_path):
    compressor().compress(of_kind(kind, make_batches()), out=tmp_path / "idx")
    before = files(tmp_path / "idx")
    with pytest.raises(ValueError, match=f"batch {b} is another than the one whose rows are in"):
        compressor().compress(of_kind(kind, changed(b)), out=tmp_path / "idx")
    assert files(tmp_path / "idx") == before
    compressor().compress(of_kind(kind, make_batches()), out=tmp_path / "idx")
    assert files(tmp_path / "idx") == before


@KINDS
@pytest.mark.parametrize("more", [-1, 1])
def test_a_rerun_with_more_or_fewer_batches_is_refused(kind, more, tmp_path):
    compressor().compress(of_kind(kind, make_batches()), out=tmp_path / "idx")
    before = files(tmp_path / "idx")
    with pytest.raises(ValueError, match=r"holds others' gradients|not as many as before"):
        compressor().compress(of_kind(kind, make_batches(COUNT + more)), out=tmp_path / "idx")
    finished = [name for name in before if name.startswith("shards")]
    assert all((tmp_path / "idx" / name).read_bytes() == before[name] for name in finished)
    assert len(dropinf.Index.open(tmp_path / "idx")) == sum(len(x) for x, _ in make_batches())


@KINDS
@pytest.mark.parametrize("fisher", [None, "kronecker"])
def test_an_append_that_begins_like_a_run_is_its_own(kind, fisher, train, tmp_path):
    more = [*make_batches(4), *make_batches(5, 7)]
    options = {"out": tmp_path / "idx", "append": True, "fisher": fisher}
    compressor().compress(make_batches(), out=tmp_path / "idx")
    both = dropinf.Gradients.cat([train, compressor().compress(more)])
    for _ in range(2):
        index = compressor().compress(of_kind(kind, more), **options)
        assert torch.equal(index[:].flat, both.flat)
        assert index.verify() == []
    if fisher is not None:
        query = compressor().compress(make_batches(1, 3))
        expected = dropinf.build_fisher(both, fisher).solve(query).flat
        torch.testing.assert_close(index.fisher().solve(query).flat, expected)


@KINDS
@pytest.mark.parametrize("fisher", [None, "block"])
def test_an_append_of_the_same_batches_is_the_finished_run(kind, fisher, train, tmp_path):
    compressor().compress(make_batches(), out=tmp_path / "idx", ids=names)
    compressor().compress(make_batches(3, 5), out=tmp_path / "idx", ids=names, append=True, fisher=fisher)
    before = files(tmp_path / "idx")
    for batches in (make_batches(), make_batches(3, 5)):
        made = dropinf.Fisher(fisher) if fisher else None
        batches = of_kind(kind, batches)
        index = compressor().compress(batches, out=tmp_path / "idx", ids=names, append=True, fisher=made)
        assert files(tmp_path / "idx") == before
        assert index.verify() == []


@KINDS
def test_the_same_batches_with_other_ids_are_others(kind, train, tmp_path):
    def later(batch):
        return [f"later {name}" for name in names(batch)]

    compressor().compress(make_batches(), out=tmp_path / "idx", ids=names)
    with pytest.raises(ValueError, match=r"ids: those of batch 0 are \['later .* and were \['é"):
        compressor().compress(of_kind(kind, make_batches()), out=tmp_path / "idx", ids=later)
    index = compressor().compress(of_kind(kind, make_batches()), out=tmp_path / "idx", ids=later, append=True)
    assert torch.equal(index[:].flat, torch.cat([train.flat, train.flat]))
    assert index.ids()[len(train) :] == [f"later {name}" for name in index.ids()[: len(train)]]


def test_a_rerun_finds_its_run_among_several_that_begin_alike(train, tmp_path):
    runs = [make_batches(), changed(5), changed(7)]
    for k, batches in enumerate(runs):
        compressor().compress(batches, out=tmp_path / "idx", append=k > 0)
    before = files(tmp_path / "idx")
    for batches in runs:
        assert len(compressor().compress(batches, out=tmp_path / "idx")) == 3 * len(train)
    with pytest.raises(ValueError, match=r"holds others' gradients \(batches: batch 6 is another"):
        compressor().compress(changed(6), out=tmp_path / "idx")
    assert files(tmp_path / "idx") == before


def test_an_iterator_is_compared_with_the_last_run_that_begins_alike(train, tmp_path):
    for batches in (make_batches(), changed(5)):
        compressor().compress(batches, out=tmp_path / "idx", append=True)
    before = files(tmp_path / "idx")
    assert len(compressor().compress(iter(changed(5)), out=tmp_path / "idx")) == 2 * len(train)
    with pytest.raises(ValueError, match="batch 5 is another"):
        compressor().compress(iter(make_batches()), out=tmp_path / "idx")
    assert files(tmp_path / "idx") == before


@pytest.mark.parametrize("at", [3, 9])
def test_an_append_that_begins_alike_goes_on(at, train, tmp_path):
    """Stopped where it is still the same as a finished run, or after it has differed."""
    more = [*make_batches(4), *make_batches(8, 7)]
    compressor().compress(make_batches(), out=tmp_path / "idx")
    with pytest.raises(StopError):
        compressor().compress(stopped(more, at), out=tmp_path / "idx", append=True)
    index = compressor().compress(iter(more), out=tmp_path / "idx", append=True)
    assert torch.equal(index[:].flat, torch.cat([train.flat, compressor().compress(more).flat]))


def stopped(batches, at):
    for b, batch in enumerate(batches):
        if b == at:
            raise StopError
        yield batch


def test_ids_are_compared_batch_by_batch(tmp_path):
    begun(tmp_path / "idx", 6, ids=names)
    swapped = make_batches()

    def others(batch):
        return ["another", *names(batch)[1:]] if torch.equal(batch[0], swapped[2][0]) else names(batch)

    with pytest.raises(ValueError, match=r"ids: those of batch 2 are \['another', .*\.\.\., and were \['é"):
        compressor().compress(make_batches(), out=tmp_path / "idx", ids=others)


LOSSES = {
    "three times": lambda model, batch: 3 * loss_fn(model, batch),
    "smoothed": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.01),
    "one class": lambda model, batch: loss_fn(model, batch) * (1 + (batch[1] == 0)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("at", [5, None])
def test_another_loss_is_refused(loss, dtype, at, tmp_path):
    if loss == "smoothed" and dtype in (torch.bfloat16, torch.float16, torch.int8):
        pytest.skip("within the rounding of what is stored")
    if at is None:
        compressor().compress(make_batches(), out=tmp_path / "idx", dtype=dtype)
    else:
        begun(tmp_path / "idx", at, dtype=dtype)
    before = files(tmp_path / "idx")
    with pytest.raises(
        ValueError, match=r"batch \d, computed again, has other gradients .* \(layer '\S+' differs by .*loss_fn"
    ):
        compressor(LOSSES[loss]).compress(make_batches(), out=tmp_path / "idx")
    assert files(tmp_path / "idx") == before
    assert compressor().compress(make_batches(), out=tmp_path / "idx").verify() == []


def test_a_loss_that_changes_later_shows_in_the_last_batch(tmp_path):
    begun(tmp_path / "idx", 6)
    last = make_batches()[5]

    def other(model, batch):
        return loss_fn(model, batch) * (2 if torch.equal(batch[0], last[0]) else 1)

    with pytest.raises(ValueError, match="batch 5, computed again, has other gradients"):
        dropinf.Compressor(make_model(), dropinf.Dropout(6), other, audit="never").compress(
            make_batches(), out=tmp_path / "idx"
        )


@pytest.mark.parametrize("size", [1e-170, 1e-30, 1.0, 1e30])
def test_gradients_of_any_size_are_compared(size, tmp_path):
    def scaled(model, batch):
        return size * loss_fn(model, batch)

    compressor(scaled).compress(make_batches(), out=tmp_path / "idx")
    compressor(scaled).compress(make_batches(), out=tmp_path / "idx")
    with pytest.raises(ValueError, match="batch 0, computed again"):
        compressor(lambda m, b: 1.5 * scaled(m, b)).compress(make_batches(), out=tmp_path / "idx")


def test_other_code_of_the_model_is_refused(tmp_path):
    class Model(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(torch.relu(x))

    compressor().compress(make_batches(), out=tmp_path / "idx")
    other = Model(*make_model())
    with pytest.raises(ValueError, match="model's code"):
        compressor(model=other).compress(make_batches(), out=tmp_path / "idx")


@pytest.mark.parametrize("place", ["shards", "parts"])
def test_files_of_another_run_are_not_taken(place, tmp_path):
    """Of the same model and sketch, in the place of its own."""
    for name, seed in (("idx", 1), ("other", 2)):
        begun_with(tmp_path / name, many(seed), 70)  # in shards of three, and a part
    own, foreign = (sorted((tmp_path / name / place).iterdir())[0] for name in ("idx", "other"))
    own.unlink()
    shutil.copy(foreign, own.parent)
    with pytest.raises(ValueError, match=f"{foreign.name}: its rows are of another run, model or sketch"):
        compressor().compress(many(1), out=tmp_path / "idx")
    (own.parent / foreign.name).unlink()
    assert compressor().compress(many(1), out=tmp_path / "idx").verify() == []


@KINDS
def test_a_part_that_is_lost_is_made_again(kind, tmp_path, monkeypatch):
    """Before others that are finished, so that their parts become a shard before they are compared."""
    compressor().compress(many(1), out=tmp_path / "whole")

    def stop(*_):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_seal", stop)
        begun_with(tmp_path / "idx", many(1), None)
    parts = sorted((tmp_path / "idx" / "parts").iterdir())
    assert len(parts) == 3
    parts[1].unlink()
    compressor().compress(of_kind(kind, many(1)), out=tmp_path / "idx")
    assert files(tmp_path / "idx") == files(tmp_path / "whole")


def many(seed):
    return make_batches(140, seed, rows=1)


def begun_with(folder, batches, at):
    with pytest.raises(StopError):
        compressor().compress(interrupted(batches, at), out=folder)


def test_a_shard_of_another_run_is_not_sound(tmp_path):
    """Though bytes and checksums agree."""
    index = compressor().compress(make_batches(), out=tmp_path / "idx")
    compressor().compress(changed(0), out=tmp_path / "other")
    own, foreign = (sorted((tmp_path / name / "shards").iterdir())[0] for name in ("idx", "other"))
    own.unlink()
    shutil.copy(foreign, own.parent)
    body = json.loads((index.path / "manifest.json").read_text())
    body["runs"][0]["shards"][0]["checksum"] = foreign.stem.split("-")[1]
    del body["checksum"]
    text = (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
    body["checksum"] = checksum(text)
    (index.path / "manifest.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    assert [line.split(": ")[1].split(",")[0] for line in dropinf.Index.open(index.path).verify()] == [
        "its rows are of another run"
    ]


def test_a_part_that_lost_its_header_is_not_taken(tmp_path):
    begun_with(tmp_path / "idx", many(1), 70)
    part = next((tmp_path / "idx" / "parts").iterdir())
    save_file(load_file(part), part)
    with pytest.raises(ValueError, match=f"{part.name}: damaged, its header is not a shard's"):
        compressor().compress(many(1), out=tmp_path / "idx")
