"""The command line: parse, do, exit; `commands` has what is done. These are the only places that print."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from .arguments import parser
from .errors import ExitCode, UklaunchError
from .timeline import mark

# Module of `commands`, imported when one of its own is to be done.
HOMES = {
    "run": ("run", "supervise"),
    "guests": ("ps", "logs", "events", "reload", "stop", "rm", "inspect"),
    "pods": ("pod create", "pod ls", "pod inspect", "pod rm", "pod exec"),
    "observe": ("pod graph", "drops", "flows", "stats", "ports", "pcap", "metrics"),
    "host": ("router load", "router status", "router unload", "gc", "doctor", "build-default", "demo"),
}

verbosity = 0
debug = False


def complain(error: UklaunchError) -> int:
    """Show an error as people want it: one line, and more only when asked."""
    hint = f" ({error.hint})" if error.hint else ""
    print(f"uklaunch: {error.message}{hint}", file=sys.stderr)
    if verbosity and error.detail:
        print(error.detail.rstrip(), file=sys.stderr)
    return int(error.exit_code)


def command(words: str) -> Callable[..., int]:
    """The function of a command: `cmd_pod_ls` for "pod ls"."""
    home = next(module for module, names in HOMES.items() if words in names)
    do: Callable[..., int] = getattr(
        import_module(f".commands.{home}", __package__), "cmd_" + re.sub("[ -]", "_", words)
    )
    return do


def main(argv: Sequence[str] | None = None) -> int:
    global verbosity, debug
    mark("cli")
    try:
        args = parser().parse_args(argv)
        verbosity, debug = int(args.verbose), args.debug
        subcommand = getattr(args, "subcommand", None)
        return command(f"{args.command} {subcommand}" if subcommand else args.command)(args)
    except UklaunchError as exc:
        if debug:
            raise
        return complain(exc)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who read our output has gone; leave nothing in the buffer for the interpreter to complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except (BaseExceptionGroup, OSError, MemoryError) as exc:
        from .errors import first_error

        if debug or (error := first_error(exc)) is None:
            raise
        return complain(error)
