"""The command line: its commands are in ``commands/``."""

from __future__ import annotations

import io
import sys

import typer

from .commands.compare import diff, replay
from .commands.diagnose import diagnose
from .commands.film import film
from .commands.options import say
from .commands.plan import doctor, models, plan
from .commands.run import fork, resume, run
from .core.errors import OutOfMemory, UnrolledError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="The diffusion pipeline, unrolled."
)
for command in (run, resume, fork, film, replay, diff, diagnose, plan, models, doctor):
    app.command()(command)


def main() -> None:
    """Entry point: every fault of the input is one sentence on standard error and an exit code, no traceback.

    Exit codes: 0 done; 2 bad input or chain; 3 model; 4 latents of another space; 5 NaN or infinity;
    6 out of memory; 7 cannot write; 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # rather no arrow than no plan, where the terminal knows ASCII alone
    try:
        app()
    except UnrolledError as error:
        say(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's, not imported here
            raise
        say("Out of memory: make the batch or the picture smaller.")
        sys.exit(OutOfMemory.exit_code)


if __name__ == "__main__":
    main()
