"""`robustlayers`: the commands, and how mistakes end.

Exit codes: 0 all done; 1 a run failed or a check found damage; 2 a mistake in what was asked, one line each on standard
error, nothing written; 130 and 143 stopped by Ctrl-C or SIGTERM, to be gone on with by the same command.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from robustlayers.cli import data, groups, plan, report, rows, run, verify

__all__ = ["main"]

_COMMANDS: dict[str, Any] = {
    "plan": plan.plan,
    "run": run.run,
    "groups": groups.groups,
    "report": report.report,
    "rows": rows.rows,
    "verify": verify.verify,
    "data": data.data,
}

_DESCRIPTION = (
    "Which layers of a network should learn from adversarial examples, and how should its normalization layers be "
    "treated while they do? A study is one YAML file; see studies/quickstart.yaml."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(f"robustlayers {version('robustlayers')}")
        sys.exit(0)
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS, prog="robustlayers", description=_DESCRIPTION, args=arguments, sort_subcommands=False
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `robustlayers rows DIR | head`
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        from robustlayers.core.errors import UserError

        if not isinstance(error, UserError):
            raise
        for fault in error.faults:
            print(fault, file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


def _terminate(number: int, frame: Any) -> None:
    sys.exit(128 + number)
