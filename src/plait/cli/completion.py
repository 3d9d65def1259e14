"""``plait completion SHELL``: a script that completes verbs, options, shipped recipes and runs.

The script asks ``plait completion --words`` at every Tab, so it cannot grow stale; that costs about one
``plait --help`` and imports no torch. Where Plait has nothing to offer, the shell completes file names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from plait.cli.output import Out
from plait.core.errors import UsageError

Candidate = tuple[str, str]
"""A word and one line about it."""

# The words go through stdin, one a line: a last empty word (Tab after a space) survives that, and no quoting is needed.
_SCRIPTS = {
    "bash": """\
# bash: eval "$(plait completion bash)"
_plait() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        COMPREPLY+=("${line%%$'\\t'*}")
    done < <(printf '%s\\n' "${COMP_WORDS[@]:1:COMP_CWORD}" | "${COMP_WORDS[0]}" completion --words 2>/dev/null)
}
complete -o default -F _plait plait
""",
    "zsh": """\
#compdef plait
# zsh: eval "$(plait completion zsh)" after compinit, or save it as _plait in a folder of $fpath
_plait() {
    local line
    local -a found
    while IFS= read -r line; do
        found+=("${line/$'\\t'/:}")
    done < <(printf '%s\\n' "${(@)words[2,CURRENT]}" | "${words[1]}" completion --words 2>/dev/null)
    if (( ${#found} )); then _describe plait found; else _files; fi
}
if [[ "${funcstack[1]}" == _plait ]]; then _plait "$@"; else compdef _plait plait; fi
""",
    "fish": """\
# fish: plait completion fish | source
function __plait_words
    set -l before (commandline -opc)
    set -l word (commandline -ct)
    set -l found (printf '%s\\n' $before[2..-1] "$word" | $before[1] completion --words 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path "$word"
    end
end
complete -c plait -f -a '(__plait_words)'
""",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("shell", nargs="?", choices=sorted(_SCRIPTS), help="which shell the script is for")
    # What the scripts call; not for people.
    parser.add_argument("--words", action="store_true", help=argparse.SUPPRESS)


def main(args: argparse.Namespace, out: Out) -> int:
    """Print the script, or complete the words on stdin."""
    if args.words:
        for word, about in complete(sys.stdin.read().splitlines()):
            out.line(f"{word}\t{about}" if about else word)
        return 0
    if args.shell is None:
        raise UsageError("no shell named", place="plait completion", remedy=f"choose one of: {', '.join(_SCRIPTS)}")
    out.line(_SCRIPTS[args.shell].rstrip())
    out.result({"shell": args.shell, "script": _SCRIPTS[args.shell]})
    return 0


def complete(words: Sequence[str]) -> list[Candidate]:
    """What the last word can become.

    Args:
        words: The words after ``plait`` up to the cursor; the last one is being typed and may be empty.
    """
    from plait.cli.main import build_parser

    # bash makes "=" a word of its own; what stands on either side of it are words for us too.
    last = words[-1] if words and words[-1] != "=" else ""
    before = [word for word in words[:-1] if word != "="]
    parser = build_parser(before[:1])
    return [c for c in _Cursor(parser, before).candidates(last) if c[0].startswith(last)]


class _Cursor:
    """Where in the command line a word stands: which parser, which positional, which option waits for its value."""

    def __init__(self, parser: argparse.ArgumentParser, before: Sequence[str]) -> None:
        self.parser = parser
        self.waiting: argparse.Action | None = None
        self.place = 0
        self.only_positionals = False
        self.before = before
        for word in before:
            self._pass(word)

    def _pass(self, word: str) -> None:
        if self.waiting is not None:
            self.waiting = None
        elif word == "--":
            self.only_positionals = True
        elif word.startswith("-") and not self.only_positionals:
            option = self._options().get(word)
            if option is not None and option.nargs != 0:
                self.waiting = option
        else:
            action = self._positional()
            if isinstance(action, argparse._SubParsersAction):
                self.parser = action.choices.get(word, self.parser)
                self.place = 0
            elif action is not None and action.nargs not in ("*", "+", argparse.REMAINDER):
                self.place += 1

    def candidates(self, last: str) -> Iterator[Candidate]:
        """Everything that may stand here; ``last`` only tells options from positionals."""
        if self.waiting is not None:
            yield from self._values(self.waiting)
        elif last.startswith("-") and not self.only_positionals:
            yield from self._option_candidates()
        else:
            action = self._positional()
            if action is not None:
                yield from self._values(action)
            elif not last:
                yield from self._option_candidates()

    def _options(self) -> dict[str, argparse.Action]:
        return {name: a for a in self.parser._actions for name in a.option_strings}

    def _option_candidates(self) -> Iterator[Candidate]:
        used = {action for name, action in self._options().items() if name in self.before}
        for action in self.parser._actions:
            if action.option_strings and action not in used and action.help != argparse.SUPPRESS:
                yield action.option_strings[-1], _one_line(action.help)

    def _positional(self) -> argparse.Action | None:
        positionals = [a for a in self.parser._actions if not a.option_strings]
        return positionals[self.place] if self.place < len(positionals) else None

    def _values(self, action: argparse.Action) -> Iterator[Candidate]:
        if isinstance(action, argparse._SubParsersAction):
            about = {choice.dest: choice.help for choice in action._choices_actions}
            yield from ((name, _one_line(about.get(name))) for name in action.choices)
        elif action.choices is not None:
            yield from ((str(choice), "") for choice in action.choices)
        elif action.dest == "recipe":
            yield from recipes()
        elif action.dest in ("run", "model"):
            yield from runs(self._folder_of_runs())

    def _folder_of_runs(self) -> Path:
        from plait.core.files import RUNS

        given = [after for word, after in zip(self.before, self.before[1:], strict=False) if word == "--runs"]
        return Path(given[-1]) if given else RUNS


def recipes() -> Iterator[Candidate]:
    """Names of the shipped recipes, with the comment that each file begins with."""
    import plait.recipes

    for path in sorted(Path(plait.recipes.__path__[0]).glob("*.yaml"), key=lambda path: path.stem):
        with path.open(encoding="utf-8") as file:
            first = file.readline()
        yield path.stem, first.removeprefix("#").strip() if first.startswith("#") else ""


def runs(folder: Path) -> Iterator[Candidate]:
    """``latest`` and the names of all runs in ``folder``, newest first."""
    if (folder / "latest").exists():
        yield "latest", f"is {(folder / 'latest').resolve().name}"
    found = [p.parent for p in folder.glob("*/recipe.yaml") if not p.parent.is_symlink()]
    yield from ((path.name, "") for path in sorted(found, key=lambda p: (p.stat().st_mtime, p.name), reverse=True))


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
