"""One dialect of docstrings: a function's says first, in the imperative, what the function does."""

import ast
from pathlib import Path

import dropinf
import dropinf_kernels

VERBS = {
    "Add", "Allocate", "Backpropagate", "Bind", "Build", "Cache", "Calibrate", "Call", "Check", "Choose", "Compare",
    "Compress", "Compute", "Connect", "Copy", "Correct", "Cut", "Declare", "Draw", "End", "Exchange", "Expand",
    "Factor", "Fill", "Find", "Finish", "Forget", "Freeze", "Gather", "Give", "Hand", "Have", "Hook", "Import",
    "Keep", "Launch", "Lay", "Learn", "Let", "Load", "Look", "Lower", "Make", "Map", "Merge", "Move", "Multiply",
    "Note", "Open", "Prepare", "Print", "Put", "Quantize", "Raise", "Read", "Remember", "Remove", "Resolve", "Return",
    "Run", "Say", "Score", "Show", "Shuffle", "Sketch", "Store", "Sum", "Take", "Tokenize", "Train", "Turn", "Wait",
    "Write", "Yield",
}  # fmt: skip
NOT_CALLED = {"property", "cached_property", "setter", "overload"}  # these read as attributes: noun phrases


def _first_words(path: Path) -> list[tuple[int, str, str]]:
    """Return (line, name, first word of the docstring) of the functions in a file that have one."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        text = ast.get_docstring(node)
        if text is not None and not decorators & NOT_CALLED:
            found.append((node.lineno, node.name, (text.split() or [""])[0]))
    return found


def test_a_functions_docstring_begins_with_an_imperative_verb() -> None:
    wrong = []
    for package in (dropinf, dropinf_kernels):
        assert package.__file__ is not None
        folder = Path(package.__file__).parent
        for path in sorted(folder.rglob("*.py")):
            for line, name, word in _first_words(path):
                if word.rstrip(",.:;") not in VERBS:
                    wrong.append(f"{folder.name}/{path.relative_to(folder)}:{line} {name} begins with {word!r}")
    assert not wrong, (
        "A function's docstring begins with what the function does, in the imperative: 'Return the axis kept whole.', "
        "not 'The axis kept whole.'; 'Return whether ...', not 'Whether ...'. Begin these with a verb, and if it is a "
        "new one, add it to VERBS:\n" + "\n".join(wrong)
    )
