"""How the commands of ``launch`` end: 0 done, 1 program error, 2 the user's mistake, 130 interrupted."""

import sys

import click

from tracekin.config import UserError


def run(command: click.Command, name: str) -> None:
    """Run a click command as ``name``: one line on stderr for a user's mistake, no traceback; never returns."""
    try:
        code = command.main(prog_name=name, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
