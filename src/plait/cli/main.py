"""The command ``plait``: finds the verb, prints faults as one line, exits with a stable code."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from types import ModuleType
from typing import NoReturn

from plait import __version__
from plait.cli.output import Out
from plait.core.errors import PlaitError

VERBS: dict[str, str] = {
    "run": "plait.cli.run",
    "plan": "plait.cli.plan",
    "resume": "plait.cli.resume",
    "doctor": "plait.cli.doctor",
    "data": "plait.cli.data",
    "runs": "plait.cli.runs",
    "config": "plait.cli.config",
    "rows": "plait.cli.rows",
    "completion": "plait.cli.completion",
}
"""Verb → module, in the order of a model's life; the whole command-line surface."""

_ABOUT = "Build your own multimodal model: one recipe, one run folder, from raw files to served tokens."
_CODES = (
    "exit codes: 0 ok, 1 internal, 2 usage, 3 config, 4 data, 5 resources, 6 numerics, 7 checkpoint, "
    "130 interrupted, 143 terminated"
)


class _Parser(argparse.ArgumentParser):
    """Argument errors follow the same shape as all others: cause, then what to do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} | fix: see `{self.prog} --help`\n")


def build_parser(verbs: tuple[str, ...] = tuple(VERBS)) -> argparse.ArgumentParser:
    """The parser with the named verbs (all by default); imports only their modules."""
    parser = _Parser(prog="plait", description=_ABOUT, epilog=_CODES, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"plait {__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for verb in verbs:
        module = load_verb(verb)
        command = commands.add_parser(
            verb, help=module.HELP, description=module.HELP, epilog=_CODES, allow_abbrev=False
        )
        module.add(command)
        _add_common(command, inner=False)
    return parser


def _add_common(command: argparse.ArgumentParser, *, inner: bool) -> None:
    """Add the flags every command has, to its own sub-commands too."""
    default = argparse.SUPPRESS if inner else False
    explain_json = "print the result as JSON; progress goes to stderr"
    command.add_argument("--json", action="store_true", default=default, help=explain_json)
    command.add_argument("--debug", action="store_true", default=default, help="show the traceback of a fault")
    for action in command._actions:  # argparse has no public way to list sub-commands
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _add_common(sub, inner=True)


def load_verb(verb: str) -> ModuleType:
    """Import the module of a verb: it has ``HELP``, ``add(parser)`` and ``main(args, out) -> exit code``."""
    return importlib.import_module(VERBS[verb])


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after ``plait``; the process's own by default.
    """
    words = sys.argv[1:] if arguments is None else arguments
    known = words[:1] if words and words[0] in VERBS else list(VERBS)
    parser = build_parser(tuple(known))
    args = parser.parse_args(words)
    if args.verb is None:
        parser.print_help()
        return 2
    try:
        return load_verb(args.verb).main(args, Out(json=args.json))
    except PlaitError as fault:
        if args.debug:
            raise
        _say_fault(fault, as_json=args.json)
        return fault.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away; point stdout at nothing so that the interpreter does not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as bug:
        if args.debug:
            raise
        _say_fault(
            PlaitError(
                f"{type(bug).__name__}: {bug}", remedy="this is a bug of Plait: run again with --debug and report it"
            ),
            as_json=args.json,
        )
        return 1


def _say_fault(fault: PlaitError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": fault.as_dict()}, ensure_ascii=False))
    bold, plain = ("\033[1;31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{bold}error [{fault.code}]:{plain} {fault.cause}", file=sys.stderr)
    if fault.place:
        print(f"  where: {fault.place}", file=sys.stderr)
    if fault.remedy:
        print(f"  fix:   {fault.remedy}", file=sys.stderr)


def entry() -> NoReturn:
    """Console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
