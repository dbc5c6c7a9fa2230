"""The Fisher matrix kept with an index, Fisher files, and rows whitened by one."""

from __future__ import annotations

import pytest
import torch

import dropinf
from tests.index.small import KINDS, make_batches, make_compressor


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
