"""Scores taken apart, against dense float64 matrices: by layer, by groups of layers, by source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf
import dropinf.gradients
from dropinf.fisher import FisherKind, build_fisher
from dropinf.gradients import Gradients
from dropinf.score import ScoreKind, score
from dropinf.score_by import ScoreParts

from .test_score import DIGEST, KINDS, SCORES, SHAPES, Recorder, Stream, assert_near, fisher_block, make

COLUMNS = {"fc": slice(0, 12), "bias": slice(12, 15), "head": slice(15, 25)}
GROUPS = {"outer": ("head", "f?"), "rest": "*"}
MEMBERS = {"outer": ["fc", "head"], "rest": ["bias"]}
SOURCES = ["wiki", 7, "news", 7, 7, "7"]


def expected_parts(query: Gradients, train: Gradients, fisher_kind: str, kind: str) -> dict[str, Tensor]:
    """The part of each layer, [Q, N], of scores with a damping of 0.2."""
    q, c = query.flat.double(), train.flat.double()
    if kind == "cosine":
        q = q / q.norm(dim=1, keepdim=True)
    divisor = c.norm(dim=1) if kind == "cosine" else torch.ones(len(c), dtype=torch.float64)
    if kind in ("influence", "relative"):
        blocks = [None] if fisher_kind == "joint" else list(SHAPES)
        inverse = torch.block_diag(
            *(
                torch.linalg.inv(fisher_block(c if b is None else c[:, COLUMNS[b]], SHAPES.get(b), fisher_kind, 0.2))
                for b in blocks
            )
        )
        q = q @ inverse
        divisor = ((c @ inverse) * c).sum(1).sqrt() if kind == "relative" else divisor
    return {name: q[:, columns] @ c[:, columns].T / divisor for name, columns in COLUMNS.items()}


def labels(n: int) -> list[str | int]:
    return [SOURCES[i % len(SOURCES)] for i in range(n)]


def expected_sums(scores: Tensor, of: list[str | int]) -> tuple[list[str | int], Tensor]:
    names = list(dict.fromkeys(of))
    columns = [scores[:, [i for i, label in enumerate(of) if label == name]].sum(1) for name in names]
    return names, torch.stack(columns, 1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropinf.gradients, "BLOCK_ROWS", 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [8, 60])
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("fisher_kind", KINDS)
def test_every_kind_is_taken_apart(fisher_kind: FisherKind, kind: ScoreKind, n: int) -> None:
    train, query = make(n), make(5, seed=1)
    fisher = build_fisher(train, fisher_kind, damping=0.2)
    expected, whole = expected_parts(query, train, fisher_kind, kind), score(query, train, fisher, kind=kind)
    for source in (train, Stream(train)):
        layers = score(query, source, fisher, kind=kind, by="layer")
        assert (layers.names, layers.values.shape) == (("fc", "bias", "head"), (3, 5, n))
        for name, part in expected.items():
            assert_near(layers[name], part)
        groups = score(query, source, fisher, kind=kind, by=GROUPS)
        assert groups.names == ("outer", "rest")
        for name, members in MEMBERS.items():
            assert_near(groups[name], torch.stack([expected[member] for member in members]).sum(0))
        for parts in (layers, groups):
            assert parts.values.dtype == torch.float64
            assert float((parts.values.sum(0) - whole).abs().max() / whole.abs().max()) < 1e-12
        sums = score(query, source, fisher, kind=kind, by="source", sources=labels(n))
        names, values = expected_sums(torch.stack(list(expected.values())).sum(0), labels(n))
        assert list(sums.names) == names == ["wiki", 7, "news", "7"]
        assert_near(sums.values, values)


def test_a_joint_fisher_mixes_the_querys_layers() -> None:
    train, query = make(60), make(1, seed=1)
    alone = Gradients(torch.cat([query.flat[:, :12], torch.zeros(1, 13, dtype=torch.float64)], 1), SHAPES, DIGEST)
    for kind, reaches in (("joint", True), ("block", False)):
        parts = score(alone, train, build_fisher(train, kind), by="layer")  # type: ignore[arg-type]
        assert bool(parts["head"].any()) == reaches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    train, query = make(60, dtype=dtype), make(5, seed=1, dtype=dtype)
    fisher = build_fisher(train, damping=0.2)
    parts = score(query, train, fisher, by="layer")
    assert parts.values.dtype == torch.float32
    for name, part in expected_parts(query, train, "block", "influence").items():
        assert_near(parts[name], part, 1e-4)
    assert score(query, train, fisher, by="source", sources=labels(60)).values.dtype == torch.float32


def test_sums_keep_what_float32_loses() -> None:
    """Ones between two large scores: added up in float32, most of the ones would be lost."""
    flat = torch.ones(1001, 1)
    flat[0] = 2.0**26
    flat[-1] = -(2.0**26)
    train = Gradients(flat, {"w": (1,)}, {"w": "a"})
    found = score(train[1:2], train, kind="dot", by="source", sources=[0] * 1001)
    assert found.values.tolist() == [[999.0]]


@pytest.mark.parametrize("kind", SCORES)
def test_sums_never_hold_the_matrix(kind: ScoreKind) -> None:
    n, q = 20_000, 64
    flat = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    train = Gradients(flat, {"w": (8,)}, {"w": "a"})
    fisher, sources = build_fisher(train), torch.arange(n) % 5
    with Recorder() as seen:
        found = score(train[:q], train, fisher, kind=kind, by="source", sources=sources)
    assert seen.largest <= 2 * q * 4096 < q * n
    expected = score(train[:q], train, fisher, kind=kind).double() @ F.one_hot(sources).double()
    assert found.names == (0, 1, 2, 3, 4)
    assert float((found.values - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_what_is_returned() -> None:
    train, query = make(8), make(5, seed=1)
    parts = score(query, train, kind="dot", by="layer")
    assert isinstance(parts, ScoreParts)
    assert (len(parts), list(parts), "fc" in parts, "fcs" in parts) == (3, ["fc", "bias", "head"], True, False)
    assert all(torch.equal(values, parts[name]) for name, values in parts.items())
    assert [name for name, _ in parts.items()] == ["fc", "bias", "head"]
    assert repr(parts) == "ScoreParts('fc', 'bias', 'head': [3, 5, 8], torch.float64)"
    with pytest.raises(KeyError, match=r"no part 'fcs'; the parts are 'fc', 'bias', 'head'"):
        parts["fcs"]
    numbers = torch.tensor([3, 3, 1, 1, 1, 9, 3, 5])
    for sources in (numbers, numbers.numpy(), list(numbers.numpy())):
        sums = score(query, train, kind="dot", by="source", sources=sources)
        assert sums.names == (3, 1, 9, 5)
        assert all(type(name) is int for name in sums.names)
    assert torch.equal(sums[9], score(query, train, kind="dot")[:, 5])
    assert repr(sums) == "ScoreParts(3, 1, 9, 5: [5, 4], torch.float64)"
    empty = {"all": ["fc", "bias", "head"], "rest": "*"}  # a rest that has no layer is zero
    assert not score(query, train, kind="dot", by=empty)["rest"].any()


def test_nothing_to_take_apart() -> None:
    train = make(8)
    assert score(train[:0], train, kind="dot", by="layer").values.shape == (3, 0, 8)
    assert score(train, train[:0], kind="dot", by=GROUPS).values.shape == (2, 8, 0)
    assert score(train[:0], train, kind="dot", by="source", sources=[0] * 8).values.shape == (0, 1)
    assert score(train, train[:0], kind="dot", by="source", sources=[]).values.shape == (8, 0)


N8: list[str | int] = ["a"] * 8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": "layers"}, ValueError, "by is 'layers'; it must be \"layer\", \"source\", or a mapping from"),
        ({"by": ["fc"]}, ValueError, r"by is \['fc'\]; it must be"),
        ({"by": {}}, ValueError, 'by: no group has \'fc\', .* sum to the score; add a group "rest": "\\*"'),
        ({"by": {"a": "fc"}}, ValueError, r"by: no group has 'bias', 'head', so the parts would not sum"),
        ({"by": {"a": "fc", "b": "*s", "c": "h?c", "r": "*"}}, ValueError, r"by\['c'\]: 'h\?c' matches no layer; .*'fc'"),
        ({"by": {"a": "f*", "b": "?c", "r": "*"}}, ValueError, "layer 'fc' is in groups 'a' and 'b', so it would count tw"),
        ({"by": {"a": "fc", "b": "*", "c": "*"}}, ValueError, "groups 'b' and 'c' both have"),
        ({"by": {"a": 3}}, TypeError, r"by\['a'\] is 3; by maps the name of a group, a str"),
        ({"by": {"a": []}}, TypeError, r"by\['a'\] is \[\]"),
        ({"by": {"a": ["fc", 3]}}, TypeError, r"by\['a'\] is \['fc', 3\]"),
        ({"by": {1: "*"}}, TypeError, r"by\[1\] is '\*'"),
        ({"by": "source"}, ValueError, 'sources is None and by is "source"; pass a list of one label per training'),
        ({"sources": N8}, ValueError, 'sources are given and by is None; pass by="source"'),
        ({"by": "layer", "sources": N8}, ValueError, "sources are given and by is 'layer'"),
        ({"by": "source", "sources": N8[1:]}, ValueError, "sources has 7 labels and train 8 samples"),
        ({"by": "source", "sources": "abcdefgh"}, TypeError, "sources is str; it must be a list of one label per"),
        ({"by": "source", "sources": set("abcdefgh")}, TypeError, "sources is set; it must be"),
        ({"by": "source", "sources": torch.tensor(3)}, TypeError, "sources is Tensor; it must be"),
        ({"by": "source", "sources": torch.zeros(8)}, TypeError, "the label of sample 0 is 0.0; it must be a str or an i"),
        ({"by": "source", "sources": [*N8[1:], None]}, TypeError, "the label of sample 7 is None"),
        ({"by": "source", "sources": [*N8[1:], True]}, TypeError, "the label of sample 7 is True"),
        ({"by": "source", "sources": str.upper}, ValueError, "sources is a function of ids, and train has none; pass a l"),
        ({"by": "layer", "top": 3}, ValueError, r"top is 3 and by is 'layer'; by takes no top: find the best first, .*top=k"),
        ({"by": "layer", "reduce": "mean"}, ValueError, r"by takes no reduce: take values\.mean\(-2\)"),
        ({"by": "layer", "out": "x.npy"}, ValueError, "by takes no out: save values"),
    ],
)  # fmt: skip
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    train = make(8)
    with pytest.raises(error, match=message):
        score(train, train, kind="dot", **options)


def test_the_way_out_of_top_works() -> None:
    train, query = make(60), make(1, seed=1)
    fisher = build_fisher(train)
    best = score(query, train, fisher, top=4)
    parts = score(query, train[best.indices.flatten()], fisher, by="layer")
    assert_near(parts.values.sum(0), best.values)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc1 = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(self.attn(x).tanh())  # type: ignore[no-any-return]


def test_the_lines_of_the_readme() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text().partition("## Ten lines")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    batches = [(torch.randn(9, 6), torch.randint(0, 3, (9,))) for _ in range(3)]
    known = {"model": Model(), "train_batches": batches, "query_batches": batches[:1], "sources": ["a", "b", "c"] * 9}
    exec(blocks[0], known)
    (block,) = (block for block in blocks if "by=" in block)
    exec(block, known)
    scores: Any = known["scores"]
    for name in ("layers", "groups"):
        torch.testing.assert_close(known[name].values.sum(0), scores)  # type: ignore[attr-defined]
    torch.testing.assert_close(known["sums"]["b"], scores[:, 1::3].sum(1))  # type: ignore[index]
