"""The `dropinf` command. Its libraries are optional, so they are imported only once a command runs."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import typer


def build_app() -> "typer.Typer":
    """Return the typer app.

    Raises:
        ModuleNotFoundError: typer is not installed.
    """
    import typer

    app = typer.Typer(add_completion=False, help="Influence functions on compressed per-sample gradients.")

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"dropinf {version('dropinf')}")
            raise typer.Exit

    # A callback keeps `demo` a sub-command: typer would otherwise fold a lone command into the root.
    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        show: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        if context.invoked_subcommand is None and not show:
            typer.echo(context.get_help())

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder for result.json and report.html.")] = Path("out/demo"),
        seed: Annotated[int, typer.Option(min=0, help="Seed of split, flips, model and sketches.")] = 0,
    ) -> None:
        """Find flipped labels in real handwritten digits, with dropout and three other compressions."""
        from dropinf.demo import DemoConfig, run_demo

        run_demo(DemoConfig(seed=seed), out)

    return app


def main() -> None:
    """Run the command line; exit with 1 and one line if an optional library is missing."""
    try:
        build_app()()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "click", "rich", "sklearn", "matplotlib"):
            raise
        sys.exit(f"dropinf: this command needs {package}; install it with: pip install 'dropinf[demo]'")


if __name__ == "__main__":
    main()
