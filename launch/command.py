"""How the commands of ``launch`` end: 0 done, 1 program error, 2 the user's mistake, 130 interrupted."""

import os
import sys

import click

from tracekin.config import UserError


def run(command: click.Command, name: str) -> None:
    """Run a click command as ``name``: one line on stderr for a user's mistake, no traceback; never returns."""
    try:
        code = command.main(prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough; or Python would complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
