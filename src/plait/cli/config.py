"""``plait config``: what may be set, what is set, and who set it; configurations of other tools as recipes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from plait.cli.output import Out

if TYPE_CHECKING:
    from pathlib import Path

    from plait.core.catalogue import Setting
    from plait.core.spec import Resolved
    from plait.recipes.foreign.fragment import Imported
    from plait.recipes.recipe import Recipe

_MISSING = object()


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("schema", help="print the JSON Schema of recipes, for editors")
    explain = actions.add_parser("explain", help="say what a setting means, its value, and where that came from")
    explain.add_argument("key", help="dotted path, such as stages.pretrain.steps")
    explain.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar=("RECIPE", "key=value"),
        help="recipe to look the value up in, and dotted settings to lay over it",
    )
    show = actions.add_parser("show", help="print a recipe with all settings and where each came from")
    show.add_argument("recipe", help="name of a shipped recipe, or path of a YAML file or run folder")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings to lay over the recipe")
    _add_import(actions.add_parser("import", help="turn a DeepSpeed or Megatron-LM configuration into a recipe"))


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="DeepSpeed JSON; or script, file of arguments or YAML of Megatron-LM")
    parser.add_argument(
        "--from",
        dest="tool",
        choices=("auto", "deepspeed", "megatron"),
        default="auto",
        help="whose it is; auto: DeepSpeed's if it begins with {",
    )
    parser.add_argument("--extends", default="standard", metavar="RECIPE", help="the recipe's parent (standard)")
    parser.add_argument("--stage", default="tune", help="stage of it that this is for: tune (default), pretrain, align")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="processes that the file was for")
    parser.add_argument(
        "--set",
        dest="variables",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the script that only the shell knows; may be given several times",
    )
    parser.add_argument("--out", metavar="FILE", help="write the recipe there, instead of printing it")


def main(args: argparse.Namespace, out: Out) -> int:
    """Print what was asked for."""
    from plait.recipes.recipe import load_recipe, recipe_schema

    if args.action == "schema":
        Out(json=True).result(recipe_schema())
        return 0
    if args.action == "import":
        return _import(args, out)
    if args.action == "show":
        resolved = load_recipe(args.recipe, args.overrides)
        out.line(resolved.to_yaml().rstrip("\n"))
        sources = {path: str(source) for path, source in resolved.sources.items()}
        out.result({"recipe": resolved.spec.model_dump(mode="json"), "sources": sources})
        return 0
    return _explain(args, out)


def _import(args: argparse.Namespace, out: Out) -> int:
    from pathlib import Path

    from plait.core.errors import UsageError
    from plait.recipes.foreign.fragment import import_config

    variables = dict(pair.partition("=")[::2] for pair in args.variables if "=" in pair)
    if len(variables) < len(args.variables):
        raise UsageError("--set takes NAME=VALUE, each name once", place="the command line", remedy="see --help")
    if args.processes < 0:
        raise UsageError(f"--processes is {args.processes}", place="the command line", remedy="give 1 or more")
    target = Path(args.out) if args.out else None
    imported = import_config(
        Path(args.file),
        tool=args.tool,
        extends=args.extends,
        stage=args.stage,
        folder=target.parent if target else Path(),
        processes=args.processes,
        variables=variables,
    )
    if target:
        _write_new(target, imported.text)
    else:
        out.line(imported.text.rstrip("\n"))
    _print_account(imported, target)
    rows = [
        {
            "key": row.leaf.key,
            "value": row.leaf.value
            if isinstance(row.leaf.value, str | int | float | list | None)
            else str(row.leaf.value),
            "where": row.leaf.where,
            "outcome": row.outcome,
            "settings": dict(row.settings),
            "why": row.why,
            "given": not row.implied,
        }
        for row in imported.rows
    ]
    out.result({"tool": imported.tool, "stage": args.stage, "recipe": imported.text, "keys": rows})
    return 0


def _write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet."""
    from plait.core.errors import ConfigError
    from plait.core.files import disk_error

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        remedy = "take another name, or delete it"
        raise ConfigError("there is a file already", place=str(path), remedy=remedy) from error
    except OSError as error:
        raise disk_error(error, path) from error


def _print_account(imported: Imported, path: Path | None) -> None:
    """One row for each key, on stderr: stdout has the recipe."""
    import sys

    from plait.recipes.foreign.account import OUTCOMES
    from plait.recipes.foreign.fragment import given, said

    found = [row for outcome in OUTCOMES for row in imported.of(outcome)]
    wide = max((min(len(given(row)), 60) for row in found), default=0)
    for row in found:
        where = row.leaf.where.rpartition("/")[2] or "not given"
        print(f"{row.outcome:<10}  {given(row):<{wide}}  {where}  {said(row)}", file=sys.stderr)
    counts = ", ".join(f"{len(imported.of(outcome))} {outcome}" for outcome in OUTCOMES)
    print(f"{len(found)} keys: {counts}" + (f"; recipe in {path}" if path else ""), file=sys.stderr)


def _explain(args: argparse.Namespace, out: Out) -> int:
    from plait.core.check import did_you_mean
    from plait.core.errors import ConfigError
    from plait.core.spec import catalogue
    from plait.recipes.recipe import Recipe, load_recipe

    resolved = load_recipe(args.recipe[0], args.recipe[1:]) if args.recipe else None
    given: dict[str, Any] = resolved.spec.model_dump(mode="json") if resolved else {}
    settings = catalogue(Recipe).settings(given)
    found = [setting for setting in settings if setting.path == args.key]
    if not found:
        remedy = did_you_mean(args.key, (setting.path for setting in settings))
        raise ConfigError(f"unknown setting {args.key!r}", place="the command line", remedy=remedy)
    below = [s.path for s in settings if s.path.startswith(f"{args.key}.") and "." not in s.path[len(args.key) + 1 :]]
    records = [_record(setting, resolved, given) for setting in found]
    for record in records:
        _print(record, below, out)
    out.result({"settings": records, "below": below})
    return 0


def _record(setting: Setting, resolved: Resolved[Recipe] | None, given: dict[str, Any]) -> dict[str, Any]:
    """What is known of one setting, ready to print."""
    from dataclasses import asdict

    record = asdict(setting)
    value = _value(given, setting.path)
    if resolved is not None and (setting.leaf or value is None) and value is not _MISSING:
        record["value"] = value
        record["from"] = _origin(setting.path, resolved)
    return record


def _value(given: Any, path: str) -> Any:
    """What plain settings hold at a dotted path; keys may have dots themselves."""
    entries = enumerate(given) if isinstance(given, list) else given.items() if isinstance(given, dict) else ()
    for key, value in entries:
        if path == str(key):
            return value
        if path.startswith(f"{key}.") and (below := _value(value, path.removeprefix(f"{key}."))) is not _MISSING:
            return below
    return _MISSING


def _origin(path: str, resolved: Resolved[Recipe]) -> str:
    """Source of a value; several where a mapping's entries came from several places."""
    found = [str(source) for name, source in resolved.sources.items() if name == path or name.startswith(f"{path}.")]
    return ", ".join(dict.fromkeys(found))


def _print(record: dict[str, Any], below: list[str], out: Out) -> None:
    import json

    rows: list[tuple[str, str]] = []
    if "value" in record:
        rows += [("value", json.dumps(record["value"], ensure_ascii=False)), ("from", record["from"])]
    rows.append(("type", record["type"]))
    if record["range"]:
        rows.append(("range", record["range"]))
    if record["leaf"]:
        default = "required" if record["required"] else json.dumps(record["default"], ensure_ascii=False)
        rows.append(("default", default))
    if record["when"]:
        rows.append(("only if", record["when"]))
    for name, lines in (("meaning", record["description"].splitlines()), ("below", below)):
        rows += [(name if number == 0 else "", line.strip()) for number, line in enumerate(lines)]
    out.line(record["path"])
    for name, text in rows:
        out.line(f"  {name:<8} {text}".rstrip())
