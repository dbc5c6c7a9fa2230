"""What a model does in forward is part of what an index was made with: another code adds no rows and asks for none."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

import dropinf
from dropinf.capture.identity import code_of
from dropinf.index.agreement import check_one_folder
from dropinf.loss_name import name_of_loss
from tests.index.small import loss_fn, make_batches

CODE = """
import dataclasses
import enum
import functools
import torch
from torch import nn

SCALE = 1.0
CALLS = [0]
MASKS = {}
TABLE = {"scale": 1.0}


def helper(x):
    return torch.tanh(x)


def times(factor):
    def decorate(function):
        @functools.wraps(function)
        def inner(*given):
            return function(*given) * factor
        return inner
    return decorate


class Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return g * 1.0


class Base(nn.Module):
    def finish(self, x):
        return x * 1.0


class Part(Base):
    seen = 0

    @times(1.0)
    def encode(self, x):
        return self.finish(x)

    def finish(self, x):
        type(self).seen += 1
        return super().finish(x)


@torch.jit.script
def scripted(x: torch.Tensor):
    return x * 1.0


class Level(enum.Enum):
    high = 1.0


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    runs: int = 0


class Act:
    def __init__(self):
        self.uses = 0

    def __call__(self, x):
        self.uses += 1
        return scripted(x) * Level.high.value * CONFIG.scale


CONFIG, ACT = Config(), Act()


def mask(n):
    CALLS[0] += 1
    if n not in MASKS:
        MASKS[n] = torch.ones(n)
    return MASKS[n]


class Net(nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.a, self.b, self.part = nn.Linear(12, 16), nn.Linear(16, 4), Part()

    def forward(self, x):
        # a comment
        return self.b(self.middle(self.a(x)) * SCALE * TABLE["scale"] * self.factor)

    def middle(self, x):
        return ACT(Turned.apply(self.part.encode(helper(x)))) * self.size * mask(16).to(x)

    @property
    def size(self):
        return 1.0

    def training_step(self, batch):
        return None
"""
OTHERS = {
    "its forward": ("TABLE[\"scale\"] * self.factor", "TABLE[\"scale\"] * self.factor * 2"),
    "a method that forward calls": (" * mask(16)", " * 2 * mask(16)"),
    "a method of a part": ("return self.finish(x)", "return self.finish(x) * 2"),
    "what super() does": ("return x * 1.0\n\n\nclass Part", "return x * 2.0\n\n\nclass Part"),
    "a script": ("def scripted(x: torch.Tensor):\n    return x * 1.0", "def scripted(x: torch.Tensor):\n    return x * 2.0"),
    "an Enum": ("high = 1.0", "high = 2.0"),
    "a configuration": ("Config(), Act()", "Config(2.0), Act()"),
    "an object that is called": ("return scripted(x) *", "return 2 * scripted(x) *"),
    "a decorator": ("return function(*given) * factor", "return function(*given) * factor * 2"),
    "what a decorator is given": ("@times(1.0)", "@times(2.0)"),
    "an autograd Function": ("        return x * 1.0\n\n    @staticmethod", "        return x * 2.0\n\n    @staticmethod"),
    "a property that it reads": ("return 1.0", "return 2.0"),
    "a helper": ("torch.tanh(x)", "torch.relu(x)"),
    "a global number": ("SCALE = 1.0", "SCALE = 2.0"),
    "a global dict": ('{"scale": 1.0}', '{"scale": 2.0}'),
    "a class attribute": ("factor = 1.0", "factor = 2.0"),
}  # fmt: skip
SAME = {
    "nothing": ("", ""),
    "a comment": ("# a comment", "# another one"),
    "its layout": ("return self.b(self.middle(self.a(x)) *", "return self.b(  self.middle(self.a(x))  *"),
    "a docstring": ("        # a comment", '        """Return logits."""'),
    "a method that forward does not call": ("return None", "return 1"),
}


def net(folder, name, change=("", "")):
    """Return the model of a file of its user's, changed."""
    path = folder / f"{name}.py"
    path.write_text(CODE.replace(*change) if change[0] else CODE)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Net().double()


def other_file(folder, name, text):
    (folder / f"{name}.py").write_text(text)


def compressor_of(model):
    return dropinf.Compressor(model, dropinf.Dropout(6), loss_fn)


@pytest.mark.parametrize("what", OTHERS)
def test_rows_of_another_code_are_refused(what, tmp_path):
    then, now = net(tmp_path, "then"), net(tmp_path, "now", OTHERS[what])
    index = compressor_of(then).compress(make_batches(), out=tmp_path / "idx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="what its modules' forward does is not what it did"):
            compressor_of(now).compress(make_batches(3, 5), out=tmp_path / "idx", append=True)
        with pytest.raises(ValueError, match="computed again, has other gradients"):
            compressor_of(now).compress(make_batches(), out=tmp_path / "idx")
    queries = compressor_of(now).compress(make_batches(1, 7))
    with pytest.raises(ValueError, match="what modules do in forward is not"):
        dropinf.score(queries, index, kind="dot")
    dropinf.score(queries, index, kind="dot", other_model=True)
    with pytest.warns(UserWarning, match="its functions are not those that"):
        dropinf.Compressor.from_index(index, now, loss_fn)
    assert index.verify() == []


@pytest.mark.filterwarnings("error", "ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("what", SAME)
def test_what_changes_nothing_counts_for_nothing(what, tmp_path):
    then, now = net(tmp_path, "then"), net(tmp_path, "now", SAME[what])
    compressor_of(then).compress(make_batches(), out=tmp_path / "idx")
    made = compressor_of(now).compress(make_batches(3, 5), out=tmp_path / "idx", append=True)
    queries = dropinf.Compressor.from_index(made, now, loss_fn).compress(make_batches(1, 7))
    assert dropinf.score(queries, made, kind="dot").shape == (len(queries), len(made))


@pytest.mark.parametrize("what", ["act(x) * 2", "act(x)", "SCALE"])
def test_another_file_of_its_users_is_read(what, tmp_path, monkeypatch):
    def model(name, scale, body):
        other_file(tmp_path, f"{name}_helpers", f"SCALE = {scale}\ndef act(x):\n    return {body}\n")
        code = f"import {name}_helpers as helpers\nfrom torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n"
        other_file(tmp_path, name, code + "        return helpers.act(x) * helpers.SCALE\n")
        return importlib.import_module(name).Net()

    monkeypatch.syspath_prepend(tmp_path)
    before = code_of(model(f"one_{len(what)}", 1.0, "x"))["functions"]
    now = code_of(model(f"two_{len(what)}", 2.0 if what == "SCALE" else 1.0, "x * 2" if what == "act(x) * 2" else "x"))[
        "functions"
    ]
    assert (before == now) == (what == "act(x)")


def test_classes_of_a_factory_stand_in_no_order():
    def made(factor):
        class Block(nn.Module):
            def forward(self, x):
                return x * factor

        return Block

    blocks = [made(factor) for factor in (1.0, 2.0, 3.0)]
    every = {
        code_of(nn.Sequential(*(blocks[i]() for i in order)))["functions"] for order in itertools.permutations(range(3))
    }
    assert len(every) == 1
    assert code_of(nn.Sequential(blocks[0]()))["functions"] not in every


ADJACENT = torch.eye(4).to_sparse()
ROUND = {}
ROUND["itself"] = ROUND


class Odd(nn.Module):
    def forward(self, x):
        return torch.sparse.mm(ADJACENT, x.t()).t() * len(ROUND) * (os.environ.get("A") is None)


class Unfriendly:
    def __getattribute__(self, name):
        raise RuntimeError("ask me nothing")


UNFRIENDLY, CLASSES = Unfriendly(), torch.classes


class Asks(nn.Module):
    def forward(self, x):
        return x if UNFRIENDLY is not None and CLASSES is not None else -x


def asks(model, x):
    return model(x).square().sum(1) if UNFRIENDLY is not CLASSES else None


def test_objects_that_cannot_be_asked():
    compressor = dropinf.Compressor(nn.Sequential(Asks(), nn.Linear(4, 2)), dropinf.Dropout(2), asks)
    train, queries = (compressor.compress([torch.randn(3, 4)]) for _ in range(2))
    assert dropinf.score(queries, train, kind="dot").shape == (3, 3)


def test_functions_that_call_each_other_again_and_again_are_asked_once():
    lines = [
        f"def f{i}(x): return f{i + 1}(x) + f{i + 1}(x) + g{i}(x)\ndef g{i}(x): return f{i + 1}(x)" for i in range(60)
    ]
    found = {"__name__": "chain"}
    exec("\n".join([*lines, "def f60(x): return x"]), found)  # 3 ** 60 ways to the last one
    assert name_of_loss(found["f0"]) == name_of_loss(found["f0"])


def test_constants_of_odd_kinds():
    assert code_of(Odd()) == code_of(Odd())
    compressor = dropinf.Compressor(
        nn.Sequential(Odd(), nn.Linear(4, 2)), dropinf.Dropout(2), lambda m, x: m(x).square().sum(1)
    )
    assert len(compressor.compress([torch.randn(3, 4)])) == 3


def test_what_a_forward_counts_and_keeps_is_no_constant(tmp_path):
    model = net(tmp_path, "net")
    train = compressor_of(model).compress(make_batches())
    queries = compressor_of(model).compress(make_batches(1, 7))
    assert dropinf.score(queries, train, kind="dot").shape == (len(queries), len(train))


def test_a_class_without_a_source_is_known_by_what_it_does():
    def made(text):
        found = {"nn": nn, "torch": torch}
        exec(textwrap.dedent(text), found)  # as in a console
        return code_of(found["Net"]())["functions"]

    text = """
    class Net(nn.Module):
        def forward(self, x):
            return torch.tanh(x)
    """
    assert made(text) == made(text)


def test_models_that_are_installed_have_no_code_of_their_users():
    assert code_of(nn.Linear(2, 2))["functions"] == code_of(nn.Sequential(nn.Tanh()))["functions"]


def test_rows_under_autocast_are_no_part_of_others(tmp_path):
    model = net(tmp_path, "net").float()

    def batches(seed):
        return [(x.float(), y) for x, y in make_batches(3, seed)]

    compressor_of(model).compress(batches(1), out=tmp_path / "idx")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(UserWarning, match="other attributes.*autocast"),
        pytest.raises(ValueError, match="they now give others than the gradients it holds"),
    ):
        compressor_of(model).compress(batches(5), out=tmp_path / "idx", append=True)


class Ranks:
    """Two ranks, the second of which sees another folder of the same name."""

    world, rank = 2, 0

    def __init__(self, sees):
        self.sees = sees

    def first(self, work):
        return work()

    def everyone(self, mine):
        return [mine, self.sees and mine]


def test_ranks_with_a_disk_each_are_refused(tmp_path):
    check_one_folder(Ranks(True), tmp_path)
    with pytest.raises(ValueError, match="is another folder on rank 1 than on rank 0; ranks need one file system"):
        check_one_folder(Ranks(False), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_folder_of_another_disk_is_not_the_one_that_was_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("dropinf.index.agreement._SHOWS", 0.0)
    monkeypatch.setattr("dropinf.index.agreement._left_in", lambda folder: ".nowhere")
    with pytest.raises(ValueError, match="is another folder on rank 0"):
        check_one_folder(Ranks(True), tmp_path)
