"""`hqqplus VERB`: thin, one function a verb. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys

import typer

from hqqplus.cli import classify, convert, env, estimate, evaluate, pages, quantize, runs, ship, use
from hqqplus.errors import UserError
from hqqplus.integrations.noise import leave_out

app = typer.Typer(
    help="Language models in 1 or 2 bits, recovered with LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# In the order in which they are listed: that of a first acquaintance.
for _verb in (
    runs.train,
    runs.validate,
    estimate.estimate,
    quantize.quantize,
    convert.convert,
    evaluate.evaluate,
    runs.table,
    classify.classify,
    pages.report,
    pages.compare,
    use.generate,
    use.chat,
    use.serve,
    ship.ship,
    ship.export,
    env.env,
):
    app.command()(_verb)


def main() -> None:
    """The console script: a user's mistake is one sentence on stderr and exit code 2."""
    leave_out()
    try:
        app()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
