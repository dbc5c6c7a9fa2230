"""Whatever is wrong with a command is one line, and help needs no library of models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dropinf.cli import app
from tests.cli.commands import (
    environment,
    error_of,
    run,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["query", "none", "--text", "a"], "none: no index (it has no manifest.json); make one with dropinf index --out none"),
        (["info", "none"], "none: no index"),
        (["verify", "none"], "none: no index"),
        (["report", "none.json", "-o", "x.html"], "none.json: No such file or directory"),
        (["index", "--model", "none", "--data", "none.jsonl", "--out", "idx"], "none.jsonl: no such file"),
        (["index", "--model", "DATA", "--data", "DATA", "--out", "idx"], "model DATA: transformers cannot load it ("),
        (["index", "--model", "MODEL", "--data", "DATA", "--text-field", "body", "--out", "idx"], "DATA, line 1: no field 'body'; its fields are id, text, label: name one with --text-field"),
        (["index", "--model", "MODEL", "--data", "DATA", "--max-tokens", "99", "--out", "idx"], "max_tokens is 99; it must be at least 2 and at most 32"),
        (["index", "--model", "MODEL", "--data", "DATA", "--layers", "*.conv.*", "--out", "idx"], "layers: '*.conv.*' matches no module or parameter"),
        (["index", "--model", "MODEL", "--data", "DATA", "--budget-bytes", "8", "--calibration", "2", "--out", "idx"], "budget_bytes is 8; "),
        (["index", "--model", "MODEL", "--data", "DATA", "--device", "cuda", "--out", "idx"], "device is 'cuda', and torch finds no GPU here"),
        (["index", "--model", "MODEL", "--data", "DATA", "--device", "cdua", "--out", "idx"], "device is 'cdua'; it must be cpu, cuda"),
    ],
)  # fmt: skip
def test_errors_are_one_line(arguments, message, folders, data, tmp_path, monkeypatch):
    if "'cuda'" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": folders("gpt2"), "DATA": str(data)}
    found = error_of(*(places.get(a, a) for a in arguments))
    assert found.startswith(message.replace("DATA", str(data)))
    with pytest.raises((ValueError, OSError)):
        CliRunner().invoke(app.build_app(), ["--debug", *(places.get(a, a) for a in arguments)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "--out", "idx"], "pass --model and --data, or --loader"),
        (["index", "--out", "idx", "--loader", "a:b", "--model", "c"], "leave --model and --data out"),
        (["index", "--out", "idx", "--loader", "a:b", "--dim", "3", "--budget-bytes", "9"], "leave --dim and --sampling out"),
        (["index", "--out", "idx", "--loader", "a:b", "--damping", "much"], "'much' is neither auto nor a number"),
        (["index", "--out", "idx", "--loader", "a:b", "--damping", "nan"], "'nan' is neither auto nor a number"),
        (["index", "--out", "idx", "--loader", "a:b", "--fisher", "full"], "'full' is not one of"),
        (["query", "idx"], "pass one of --text, --data and --loader"),
        (["query", "idx", "--text", "a", "--data", "b"], "pass one of --text, --data and --loader"),
        (["query", "idx", "--text", "a", "--kind", "dot", "--damping", "1"], "--kind dot reads no Fisher matrix"),
        (["fisher", "idx", "--damping", "-1"], "'-1' is neither auto nor a number"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(arguments, message, made, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = run(*(str(made[0]) if a == "idx" and arguments[0] == "query" else a for a in arguments), code=2)
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("missing", "arguments", "wanted"),
    [
        ("transformers", ["index", "--model", "m", "--data", "DATA", "--out", "idx"], "'dropinf[hf]'"),
        ("gguf", ["index", "--model", "a/m.gguf", "--data", "DATA", "--out", "idx"], "gguf"),
        ("datasets", ["index", "--model", "m", "--data", "some/data", "--out", "idx"], "datasets"),
        ("pyarrow", ["index", "--model", "m", "--data", "a.parquet", "--out", "idx"], "pyarrow"),
        ("faiss", ["export", "MADE", "rows.faiss"], "'dropinf[faiss]'"),
        ("rich", ["self-influence", "MADE"], "'dropinf[cli]'"),
        ("sklearn", ["demo"], "'dropinf[demo]'"),
    ],
)
def test_a_library_that_is_missing(missing, arguments, wanted, made, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch()
    for name in [n for n in sys.modules if n == missing or n.startswith(f"{missing}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "sklearn":
        monkeypatch.delitem(sys.modules, "dropinf.demo.demo", raising=False)
    places = {"DATA": str(data), "MADE": str(made[0])}
    found = error_of(*(places.get(a, a) for a in arguments))
    assert found == f"this command needs {missing}; install it with: pip install {wanted}"


def test_without_typer(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    for command, wanted in (("info", "cli"), ("demo", "demo")):
        monkeypatch.setattr(sys, "argv", ["dropinf", command])
        with pytest.raises(SystemExit) as caught:
            app.main()
        assert caught.value.code == 1
        found = capsys.readouterr().err
        assert found == f"dropinf: this command needs typer; install it with: pip install 'dropinf[{wanted}]'\n"


def test_help_imports_no_model_library():
    code = (
        "import sys; sys.argv = ['dropinf', 'index', '--help']\n"
        "from dropinf.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('transformers', 'datasets', 'pyarrow', 'sklearn', 'matplotlib', 'faiss') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--budget-bytes" in done.stdout
    assert "from dropinf.transformer import Workload" in done.stdout
    assert "\x1b" not in done.stdout
