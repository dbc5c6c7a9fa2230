"""Which ways for CUDA the code has, and which of them were taken.

Modules that ask for the device are compiled with marks in them: on the truth value of each such question, on each
statement that hangs on it, and on each call of torch.cuda.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = {"dropinf_kernels": ROOT / "dropinf_kernels", "dropinf": ROOT / "python" / "dropinf"}
_WORDS = ("cuda", "cpu", "hip", "nccl")
_BLOCKS = ("body", "orelse", "finalbody")
_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
Mark = tuple[str, int, str]  # file, line, what: the question and its answer, or a statement

taken: set[Mark] = set()


def ran(path: str, line: int, what: str) -> None:
    """Note that a statement ran."""
    taken.add((path, line, what))


def answered(value: Any, path: str, line: int, what: str) -> Any:
    """Note what a question came to, and pass it on."""
    taken.add((path, line, f"{what}: {bool(value)}"))
    return value


def called(value: Any, path: str, line: int, what: str) -> Any:
    """Note that a call returned, and pass on what."""
    taken.add((path, line, what))
    return value


def _asks(node: ast.AST) -> bool:
    """Return whether an expression asks for the device."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and (part.attr == "is_cuda" or ast.unparse(part).startswith("torch.cuda.")):
            return True
        if isinstance(part, ast.Attribute) and ast.unparse(part) == "torch.version.hip":
            return True
        if isinstance(part, ast.Compare) and any(
            isinstance(c, ast.Constant) and c.value in _WORDS for c in part.comparators
        ):
            return True
    return False


class _Marks(ast.NodeTransformer):
    """Puts the marks in. `wanted` are all of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = str(path.relative_to(ROOT)), path.read_text().splitlines()
        self.wanted: set[Mark] = set()

    def _call(self, function: str, node: ast.AST, what: str, *first: ast.expr) -> ast.Call:
        line = node.lineno  # type: ignore[attr-defined]
        arguments = [*first, ast.Constant(self.path), ast.Constant(line), ast.Constant(what)]
        call = ast.Call(ast.Name(f"_{function}_", ast.Load()), arguments, [])
        return ast.fix_missing_locations(ast.copy_location(call, node))

    def _question(self, node: ast.expr) -> ast.expr:
        """Mark each part of a condition that asks for the device."""
        if isinstance(node, ast.BoolOp):
            node.values = [self._question(value) for value in node.values]
            return node
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self._question(node.operand)
            return node
        if isinstance(node, ast.IfExp) or not _asks(node):
            return self.visit(node)  # type: ignore[no-any-return]
        what = ast.unparse(node)
        self.wanted |= {(self.path, node.lineno, f"{what}: {answer}") for answer in (True, False)}
        return self._call("answered", node, what, node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        node.test = self._question(node.test)
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        return self._question(node)

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        node.iter, node.ifs = self.visit(node.iter), [self._question(test) for test in node.ifs]
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is not None:
            is_question = isinstance(node.value, ast.Compare | ast.UnaryOp) and _asks(node.value)
            node.value = self._question(node.value) if is_question else self.visit(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if not name.startswith("torch.cuda."):
            return node
        self.wanted.add((self.path, node.lineno, f"{name}()"))
        return self._call("called", node, f"{name}()", node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in _BLOCKS:
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, self._arms(block))
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        node.asks = _asks(node.test)  # type: ignore[attr-defined]
        node.test = self._question(node.test)
        body, orelse = node.body, node.orelse
        node.body, node.orelse = [self.visit(s) for s in body], [self.visit(s) for s in orelse]
        node.body, node.orelse = self._arms(node.body), self._arms(node.orelse)
        return node

    def _arms(self, block: list[ast.stmt]) -> list[ast.stmt]:
        """Mark the statements of a block that hang on a question: its arms, or what follows where one leaves."""
        marked: list[ast.stmt] = []
        hangs = False
        for statement in block:
            if hangs:
                marked.append(self._ran(statement))
            marked.append(statement)
            if isinstance(statement, ast.If) and getattr(statement, "asks", False):
                statement.body = self._all(statement.body)
                statement.orelse = self._all(statement.orelse)
                hangs |= isinstance(statement.body[-1], _ENDS) and not statement.orelse
        return marked

    def _all(self, block: Sequence[ast.stmt]) -> list[ast.stmt]:
        return [part for statement in block for part in (self._ran(statement), statement)]

    def _ran(self, statement: ast.stmt) -> ast.stmt:
        what = self.lines[statement.lineno - 1].strip()
        self.wanted.add((self.path, statement.lineno, what))
        mark = ast.Expr(self._call("ran", statement, what))
        return ast.copy_location(mark, statement)


def marked(path: Path) -> tuple[ast.Module, set[Mark]]:
    """Return a module with marks in it, and all of them."""
    marks = _Marks(path)
    return marks.visit(ast.parse(path.read_text())), marks.wanted


def every() -> Iterator[tuple[Path, set[Mark]]]:
    """Yield the modules that ask for the device, with their marks."""
    for folder in FOLDERS.values():
        for path in sorted(folder.rglob("*.py")):
            _, wanted = marked(path)
            if wanted:
                yield path, wanted


def missing() -> list[Mark]:
    """Return the marks that were not taken."""
    return sorted(set().union(*(found for _, found in every())) - taken)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        tree, _ = marked(Path(self.path))
        return compile(tree, self.path, "exec")  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_ran_=ran, _answered_=answered, _called_=called)
        super().exec_module(module)


class _Finder:
    """Finds the modules that are to be marked."""

    def __init__(self) -> None:
        self.paths = {str(path) for path, _ in every()}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in FOLDERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin not in self.paths:
            return None
        return importlib.util.spec_from_file_location(name, spec.origin, loader=_Loader(name, spec.origin))


def watch() -> None:
    """Have modules marked that are imported from now on."""
    imported = [name for name in sys.modules if name.partition(".")[0] in FOLDERS]
    assert not imported, f"imported already, without marks: {imported}"
    sys.meta_path.insert(0, _Finder())
