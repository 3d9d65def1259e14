"""The command ``plait``: finds the verb, prints faults as one line, exits with a stable code."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType
from typing import NoReturn

from plait import __version__
from plait.cli.output import Out
from plait.core.errors import PlaitError, Stopped, UsageError
from plait.core.launch import place, tell_launcher

VERBS: dict[str, str] = {
    "run": "run a recipe: every stage in order, into one run folder",
    "plan": "say what a recipe needs: weights, tokens, FLOPs, memory, disk, time; no side effects",
    "resume": "continue an interrupted run from its last complete state",
    "chat": "ask a model about pictures, sounds and videos, in the terminal",
    "serve": "serve a model over HTTP as OpenAI's chat completions, on this machine only",
    "embed": "pictures and texts as vectors of one space, and how near they are",
    "export": "write a model in a layout that other tools load: LLaVA's of Hugging Face transformers",
    "doctor": "check this machine: versions, CPU, memory, disk, speed, packages",
    "data": "fetch data packages, show the data card or samples",
    "sweep": "search over a recipe's settings, trials ending early; then one run of the best, with test scores",
    "runs": "list runs, show one, or compare several",
    "track": "send the records of a run to its trackers, or to another",
    "list": "list what a model may be made of: encoders, connectors, decoders, fusions, positions, recipes",
    "advise": "say which encoder, or which layout of several processes: from costs counted or measured, with reasons",
    "config": "print the recipe schema, explain a setting, or show a resolved recipe",
    "study": "try claims of the field on small models: positions, fusion, attention, connectors, encoders",
    "rows": "show which rows of the requirements checklist have tests (in a source checkout)",
    "completion": "print a completion script for bash, zsh or fish",
}
"""Verb → what it does, in the order of a model's life; the whole surface. Verb ``run`` is :mod:`plait.cli.run`."""

_ABOUT = "Build your own multimodal model: one recipe, one run folder, from raw files to served tokens."
_CODES = (
    "exit codes: 0 ok, 1 internal, 2 usage, 3 config, 4 data, 5 resources, 6 numerics, 7 checkpoint, "
    "130 interrupted, 143 terminated"
)


class _Parser(argparse.ArgumentParser):
    """Faults of usage are reported like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, place=f"{self.prog} ...", remedy=f"{_meant(message)}see `{self.prog} --help`")


_ELSEWHERE = {"compare": "runs compare", "show": "runs show", "fetch": "data fetch", "train": "run", "eval": "run"}
"""Verb that a person may try first → where it is."""


def _meant(message: str) -> str:
    """What an unknown verb or choice may have meant; "" if nothing is near."""
    if (found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)) is None:
        return ""
    word, known = found[1], re.findall(r"'([^']*)'", found[2])
    if "runs" in known and word in _ELSEWHERE:
        return f"`plait {_ELSEWHERE[word]}`; "
    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def build_parser(verbs: Iterable[str] = VERBS) -> argparse.ArgumentParser:
    """The parser, with the arguments of the named verbs; of the others it knows the names only, without an import."""
    parser = _Parser(prog="plait", description=_ABOUT, epilog=_CODES, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"plait {__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for verb, about in VERBS.items():
        command = commands.add_parser(verb, help=about, description=about, epilog=_CODES, allow_abbrev=False)
        if verb in verbs:
            load_verb(verb).add(command)
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
    """Import the module of a verb: it has ``add(parser)`` and ``main(args, out) -> exit code``."""
    return importlib.import_module(f"plait.cli.{verb}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after ``plait``; the process's own by default.
    """
    words = sys.argv[1:] if arguments is None else arguments
    as_json, debug = "--json" in words and not place(), "--debug" in words
    try:
        args = _parse(words)
        if args.verb is None:
            build_parser(()).print_help()
            return 2
        return load_verb(args.verb).main(args, Out(json=as_json, silent=place() > 0))
    except BrokenPipeError:
        # The reader (head, less) went away; point stdout at nothing so that the interpreter does not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        code = stop.exit_code if isinstance(stop, Stopped) else 130
        if not place():
            _say_stopped(str(stop) or "interrupted", code, as_json=as_json)
        return code
    except PlaitError as fault:
        tell_launcher(fault)
        if debug:
            raise
        _say_fault(fault, as_json=as_json)
        return fault.exit_code
    except Exception as bug:
        if debug:
            raise
        remedy = "this is a bug of Plait: run again with --debug and report it"
        fault = PlaitError(f"{type(bug).__name__}: {bug}", remedy=remedy)
        tell_launcher(fault)
        _say_fault(fault, as_json=as_json)
        return 1


def _terminate(number: int, frame: object) -> NoReturn:
    raise Stopped(number, "terminated")


def _parse(words: list[str]) -> argparse.Namespace:
    """Parse; settings (``key=value``) and runs may stand before and after options, unlike with argparse alone."""
    parser = build_parser(words[:1])
    args, late = parser.parse_known_args(words)
    name = "overrides" if hasattr(args, "overrides") and all("=" in word for word in late) else "run"
    taken: object = getattr(args, name, None)
    if not late:
        return args
    if not isinstance(taken, list) or any(word[0] == "-" for word in late):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    setattr(args, name, [*taken, *late])
    return args


def _say_stopped(text: str, code: int, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": {"code": "stopped", "exit_code": code, "cause": text}}, ensure_ascii=False))
    print(text, file=sys.stderr)


def _say_fault(fault: PlaitError, *, as_json: bool) -> None:
    """Of several processes the first one says all; another only what it met itself and has not passed on to be said."""
    if place() and (fault.rank is not None or isinstance(fault, UsageError)):
        return
    if as_json:
        print(json.dumps({"error": fault.as_dict()}, ensure_ascii=False))
    bold, plain = ("\033[1;31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    who = f"process {place()}: " if place() else ""
    lines = [f"{who}{bold}error [{fault.code}]:{plain} {fault.cause}"]
    lines += [f"  where: {fault.place}"] if fault.place else []
    lines += [f"  fix:   {fault.remedy}"] if fault.remedy else []
    print("\n".join(lines), file=sys.stderr)  # at once: other processes write there, too


def entry() -> NoReturn:
    """Console script."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())


if __name__ == "__main__":
    entry()
