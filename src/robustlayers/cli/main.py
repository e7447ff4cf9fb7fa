"""`robustlayers`: the commands, and how mistakes end.

Exit codes: 0 all done; 1 a run failed, a check found damage, or the system refused to read or write (a full disk, a
folder without permission), in one line with the path and what the system says; 2 a mistake in what was asked, one line
each on standard error, nothing written; 130 and 143 stopped by Ctrl-C or SIGTERM, to be gone on with by the same
command; 141 nobody reads the output.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from robustlayers.cli import analyse, data, evaluate, groups, plan, presets, report, rows, run, verify

__all__ = ["main"]

_COMMANDS: dict[str, Any] = {
    "plan": plan.plan,
    "run": run.run,
    "evaluate": evaluate.evaluate,
    "analyse": analyse.analyse,
    "groups": groups.groups,
    "presets": presets.presets,
    "report": report.report,
    "rows": rows.rows,
    "verify": verify.verify,
    "data": data.data,
}

_STOPPED = "stopped; the same command goes on from here"

_DESCRIPTION = (
    "Which layers of a network should learn from adversarial examples, and how should its normalization layers be "
    "treated while they do? A study is one YAML file; see studies/quickstart.yaml."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["analyze"]:  # as it is spelled in America
        arguments[0] = "analyse"
    if arguments in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(f"robustlayers {version('robustlayers')}")
        sys.exit(0)
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS, prog="robustlayers", description=_DESCRIPTION, args=arguments, sort_subcommands=False
        )
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        sys.exit(130)
    except _Terminated:
        print(_STOPPED, file=sys.stderr)
        raise
    except BrokenPipeError:  # `robustlayers rows DIR | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        from robustlayers.core.errors import UserError, system_text

        if isinstance(error, OSError) and (text := system_text(error)):
            print(text, file=sys.stderr)
            sys.exit(1)
        if not isinstance(error, UserError):
            from robustlayers.study.together import Ended

            if isinstance(error, Ended):
                print(f"failed: {error}", file=sys.stderr)
                sys.exit(1)
            raise
        for fault in error.faults:
            print(fault, file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


class _Terminated(SystemExit):
    """Raised where SIGTERM arrives, so that workers are ended and files closed on the way out."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated(128 + number)
