"""The `kimi-recursive` command: its subcommands, and how an error ends it."""

from __future__ import annotations

import sys

import typer

from kimi_recursive.cli.evaluate import evaluate
from kimi_recursive.cli.generate import generate
from kimi_recursive.cli.lm_eval import lm_eval
from kimi_recursive.cli.log import app as log
from kimi_recursive.cli.plan import plan
from kimi_recursive.cli.run_experiment import run_experiment
from kimi_recursive.cli.track_b import app as track_b
from kimi_recursive.cli.upload import upload
from kimi_recursive.doors import missing_extra
from kimi_recursive.processes.logs import USER_ERROR_EXIT_CODE

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Give a pretrained decoder a recursive refinement loop and measure what it does.",
)

app.add_typer(track_b, name="track-b")
app.add_typer(log, name="log")
for command in (generate, upload, plan, evaluate, run_experiment):
    app.command()(command)
_passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("lm-eval", no_args_is_help=True, context_settings=_passed_on)(lm_eval)

# What a command needs beyond the plain install; the others need `train`.
EXTRAS = {"log": "records", "plan": "workflow", "track-b": "workflow", "lm-eval": "eval"}


def main() -> None:
    """Run the command. A user error, or a file that cannot be read or written, ends it with one
    line and exit code 2."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    try:
        with missing_extra(EXTRAS.get(command, "train"), f"`kimi-recursive {command}`"):
            app(standalone_mode=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USER_ERROR_EXIT_CODE) from None
