"""The rooms of both packages: what a folder or file may import, and that all imports run one way."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"dropinf_kernels": ROOT / "dropinf_kernels", "dropinf": ROOT / "python" / "dropinf"}
KERNELS = {"dropinf_kernels"}
BASE = {
    "files",
    "readonly",
    "outflow",
    "ranks",
    "workload",
    "loss_name",
    "origin",
    "gradients",
    "builder",
    "metrics",
    "sketch",
} | KERNELS
VERBS = BASE | {"capture", "fisher", "index", "text", "compressor", "score", "budget"}
# Room -> the rooms that it may import, itself aside.
MAY_IMPORT = {
    "dropinf_kernels": {
        "device": set(),
        "op": {"device"},
        "ops": {"op", "device"},
        "gpu": {"ops", "op", "device"},
        "__init__": {"ops", "op", "gpu"},
    },
    "dropinf": {
        "files": set(),
        "readonly": set(),
        "outflow": set(),
        "ranks": set(),
        "workload": {"files"},
        "loss_name": {"workload", "files"},
        "measure": {"workload"},
        "origin": set(),
        "gradients": {"files", "readonly", "origin"},
        "builder": {"gradients", "outflow", "origin"},
        "metrics": {"files"},
        "sketch": KERNELS,
        "capture": KERNELS | {"sketch", "workload", "files", "loss_name", "origin"},
        "fisher": KERNELS | {"sketch", "gradients", "files", "ranks", "origin"},
        "index": BASE | {"fisher"},
        "text": {"workload", "files"},
        "transformer": {"text", "workload"},
        "compressor": VERBS,
        "recording": BASE | {"capture"},
        "score_by": {"gradients", "ranks"},
        "score": VERBS | {"score_by"},
        "directions": BASE | {"capture", "fisher", "index", "compressor"},
        "budget": VERBS,
        "checkpoints": VERBS,
        "select": VERBS | {"recording"},
        "one_call": VERBS,
        "__init__": VERBS | {"one_call", "recording", "checkpoints", "select", "score_by", "directions", "measure"},
        "interop": VERBS | {"__init__", "recording", "directions"},
        "demo": VERBS | {"__init__"},
        "cli": VERBS | {"__init__", "demo", "directions"},
    },
}  # fmt: skip
MOST_FLOORS = 9
MOST_LINES = 400
MOST_README_LINES = 10


def module_of(path: Path) -> tuple[str, ...]:
    """Return a file's module, as the parts of its name; of a package its `__init__`."""
    package = next(name for name, folder in PACKAGES.items() if folder in path.parents)
    return (package, *path.relative_to(PACKAGES[package]).with_suffix("").parts)


FILES = {module_of(path): path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))}


def named(parts: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the file that a dotted name is, if it is one of ours."""
    return next((known for known in (parts, (*parts, "__init__")) if known in FILES), None)


def imported_by(module: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Return the files that a file imports anywhere: at its top, in a function, or for its types alone."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {named(tuple(alias.name.split("."))) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            # `from . import name` names a file of the folder, or something that its `__init__` has.
            found |= {named((*base, alias.name)) or named(base) for alias in node.names}
    return {other for other in found if other is not None}


IMPORTS = {module: imported_by(module) for module in FILES}


def room_of(module: tuple[str, ...], seen_from: str) -> str:
    """Return a file's room, as the other package sees it or its own."""
    return module[1] if module[0] == seen_from else module[0]


def test_every_room_stands_in_the_table():
    for package, table in MAY_IMPORT.items():
        assert {room_of(module, package) for module in FILES if module[0] == package} == set(table)


@pytest.mark.parametrize("module", FILES, ids=".".join)
def test_a_file_imports_what_its_room_may(module):
    room = room_of(module, module[0])
    rooms = {room_of(other, module[0]) for other in IMPORTS[module]} - {room}
    assert rooms <= MAY_IMPORT[module[0]][room], f"{FILES[module]} imports more than its room may"


@pytest.mark.parametrize("module", FILES, ids=".".join)
def test_a_file_names_its_own_package_by_dots(module):
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if "." in alias.name]  # `import dropinf` is what users write
        own = [name for name in names if name.split(".")[0] == module[0]]
        assert not own, f"{FILES[module]}, line {node.lineno}: the import of {own} must be relative"


@pytest.mark.parametrize("module", FILES, ids=".".join)
def test_a_file_imports_its_own_by_statements(module):
    """What a call imports by its name would not be seen here."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            assert not name.startswith((".", *PACKAGES)), f"{FILES[module]}, line {node.lineno}: a call imports {name}"


def test_no_two_files_import_each_other():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join('.'.join(module) for module in error.args[1])}") from None


def floors() -> dict[str, int]:
    """Return on which floor each room of dropinf stands: above all that it imports; the kernels are one room."""
    rooms: dict[str, set[str]] = {}
    for module, others in IMPORTS.items():
        room = room_of(module, "dropinf")
        rooms.setdefault(room, set()).update({room_of(other, "dropinf") for other in others} - {room})
    found: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():  # raises CycleError where rooms import each other
        found[room] = 1 + max((found[below] for below in rooms[room]), default=0)
    return found


def test_the_house_has_few_floors():
    assert max(floors().values()) <= MOST_FLOORS, floors()


def test_no_file_is_long():
    sources = [*FILES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert {path.name: path for path in sources if len(path.read_text().splitlines()) > MOST_LINES} == {}


FOLDERS = sorted({path.parent for path in FILES.values()})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_says_what_it_is_for(folder):
    lines = (folder / "README.md").read_text().splitlines()
    assert 3 <= len(lines) <= MOST_README_LINES
    assert any("import" in line for line in lines)
    assert any("Start with" in line for line in lines)
