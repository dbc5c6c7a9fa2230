"""The `dropinf` command. Its libraries are optional, so they are imported only once a command runs."""

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch

from .console import is_first, plain

if TYPE_CHECKING:
    import typer


F = TypeVar("F", bound=Callable[..., None])
# Package -> what to install for it.
_EXTRAS = {
    "typer": "'dropinf[cli]'",
    "click": "'dropinf[cli]'",
    "rich": "'dropinf[cli]'",
    "transformers": "'dropinf[hf]'",
    "tokenizers": "'dropinf[hf]'",
    "sklearn": "'dropinf[demo]'",
    "matplotlib": "'dropinf[demo]'",
    "faiss": "'dropinf[faiss]'",
    "gguf": "gguf",
    "pyarrow": "pyarrow",
    "datasets": "datasets",
}
_ARGUMENTS = (
    "text_field|id_field|label_field|max_tokens|task|limit|layers|budget_bytes|damping|dtype|tokens_per_batch|"
    "memory_bytes"
)


def build_app() -> "typer.Typer":
    """Return the typer app.

    Raises:
        ModuleNotFoundError: typer is not installed.
    """
    import typer

    from . import doctor, few_bits, index, query

    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Influence functions on compressed per-sample gradients.",
    )
    chosen = {"debug": False}

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"dropinf {version('dropinf')}")
            raise typer.Exit

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        show: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
        ] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    ) -> None:
        chosen["debug"] = debug
        if context.invoked_subcommand is None and not show:
            typer.echo(context.get_help())

    def demo(
        out: Annotated[Path, typer.Option(help="Folder for result.json and report.html.")] = Path("out/demo"),
        seed: Annotated[int, typer.Option(min=0, help="Seed of split, flips, model and sketches.")] = 0,
    ) -> None:
        """Find flipped labels in real handwritten digits, with dropout and three other compressions."""
        from ..demo.demo import DemoConfig, run_demo

        run_demo(DemoConfig(seed=seed), out)

    for command in (
        demo, index.index, query.query, query.report, query.self_influence, query.fisher,
        query.verify, query.compact, few_bits.requantize, query.info, query.export, doctor.doctor,
    ):  # fmt: skip
        name = command.__name__.replace("_", "-")
        app.command(name)(_guarded(command, lambda: chosen["debug"]))
    return app


def _guarded(command: F, debug: Callable[[], bool]) -> F:
    """Return the command with its errors turned into one line and an exit status."""
    import typer

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                command(*args, **kwargs)
            except KeyboardInterrupt:
                more = "; run the same command again to go on" if command.__name__ == "index" else ""
                _say(f"stopped{more}")
                raise typer.Exit(130) from None
            except BrokenPipeError:  # what reads standard output has seen enough
                raise
            except Exception as error:
                line = explain(error)
                if debug() or line is None:
                    raise
                _say(line)
                raise typer.Exit(1) from None

    return guarded  # type: ignore[return-value]


def explain(error: Exception) -> str | None:
    """Return a line on an error of the data, the model, the index or the machine; None for a fault of the program."""
    if isinstance(error, ModuleNotFoundError):
        return missing(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; lower --tokens-per-batch or --dim"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError):
        return _with_options(" ".join(str(error).split()) or type(error).__name__)
    return None


def missing(error: ModuleNotFoundError) -> str:
    """Return one line on a library that is not installed."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return str(error)
    wanted = "'dropinf[demo]'" if sys.argv[1:2] == ["demo"] else _EXTRAS[package]
    return f"this command needs {package}; install it with: pip install {wanted}"


def _with_options(message: str) -> str:
    """Return a message of the library with its arguments named as options."""
    message = message.replace("pass append=True", "pass --append").replace("pass packed=False", "leave --packed out")
    message = message.replace("Index.discard()", "dropinf index --discard")

    def option(found: re.Match[str]) -> str:
        return "--" + found[1].replace("_", "-") + (" " if found[2] else "")

    return re.sub(rf"\b({_ARGUMENTS})=(?=([\w']?))", option, message)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if is_first():
        _say(_with_options(" ".join(str(message).split())))


def _say(line: str) -> None:
    """Print a line on standard error, on any rank; where there are several, name the rank."""
    rank = f"rank {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"dropinf: {rank}{plain(line)}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line; exit with 1 and one line if a library that it needs is missing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # rather than to fail on a terminal without Unicode
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        _say(missing(error))
        sys.exit(1)
    try:
        app()
    except SystemExit as done:
        if "WORLD_SIZE" in os.environ and done.code in (0, None):
            # All is written, and threads of torch.distributed's may still run, which a library's end would abort.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        raise
