"""The ``tokgraph`` command group and its exit codes: 0 done, 1 refused or failed, 2 usage, 3 verification failed."""

from __future__ import annotations

import logging
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


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tokgraph.__version__, prog_name="tokgraph")
def main() -> None:
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
