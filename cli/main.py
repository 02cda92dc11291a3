"""The ``tokgraph`` command group and its exit codes: 0 done, 1 refused or failed, 2 usage, 3 verification failed."""

from __future__ import annotations

import logging
import traceback
from typing import Any

import click

import tokgraph
from tokgraph.errors import TokgraphError, VerificationError

from .export import export
from .inspect import inspect
from .optimize import optimize
from .plan import compare, diff, plan
from .policies import policies
from .profile import profile
from .run import run


class _Commands(click.Group):
    """A group that turns errors a user can act on into a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VerificationError as error:
            click.echo(str(error), err=True)
            ctx.exit(3)
        except TokgraphError as error:
            click.echo(str(error), err=True)
            ctx.exit(1)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            click.echo(traceback.format_exc() if ctx.params.get("debug") else _unexpected(error), err=True)
            ctx.exit(1)


def _unexpected(error: Exception) -> str:
    """What to say of an error that is none of the user's: where in tokgraph it arose, without the traceback."""
    own = [
        f for f in traceback.extract_tb(error.__traceback__) if "/tokgraph/" in f.filename or "/passes/" in f.filename
    ]
    at = f"\n  --> source: {own[-1].filename}:{own[-1].lineno}" if own else ""
    return (
        f"internal error: {type(error).__name__}: {error}{at}\n"
        "  help: please report this, with what `tokgraph --debug ...` prints; nothing was written"
    )


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tokgraph.__version__, prog_name="tokgraph")
@click.option("--debug", is_flag=True, help="Print tracebacks of internal errors.")
def main(debug: bool) -> None:
    """Thin the visual tokens of unified vision-language models while their tasks keep sharing parameters."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)


main.add_command(optimize)
main.add_command(inspect)
main.add_command(plan)
main.add_command(diff)
main.add_command(compare)
main.add_command(policies)
main.add_command(export)
main.add_command(profile)
main.add_command(run)
