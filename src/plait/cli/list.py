"""``plait list [KIND]``: what a model may be made of and trained by, each part with one line and its source."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from plait.cli.output import Out

KINDS = (
    "encoders",
    "connectors",
    "decoders",
    "fusions",
    "positions",
    "objectives",
    "optimizers",
    "schedules",
    "recipes",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("kind", nargs="?", choices=KINDS, help="only these (default: all)")


def main(args: argparse.Namespace, out: Out) -> int:
    """Print every part, one line each."""
    found = {kind: parts for kind, parts in catalogue().items() if args.kind in (None, kind)}
    for kind, parts in found.items():
        for modality in dict.fromkeys(part.get("modality", "") for part in parts):
            group = [part for part in parts if part.get("modality", "") == modality]
            out.line(f"{kind} of {modality} ({len(group)})" if modality else f"{kind} ({len(group)})")
            width = max(len(part["name"]) for part in group)
            for part in group:
                where = f"  [{part['where']}]" if "where" in part else ""
                source = f"  {part['source']}" if part["source"] else ""
                out.line(f"  {part['name']:<{width}}  {part['about']}{source}{where}")
    out.result(found)
    return 0


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Kind → parts, each with ``name``, ``about``, ``source``; settings and defaults as the specs have them.

    Encoders also have the ``modality`` they read, objectives ``where`` they are chosen.
    """
    from plait.models import audio_specs, composition, fusion_specs, specs, text_specs, video_specs
    from plait.objectives import specs as objectives
    from plait.training import optim, schedule

    by_modality = {
        "image": specs.ImageEncoder,
        "audio": audio_specs.AudioEncoder,
        "video": video_specs.VideoEncoder,
        "text": text_specs.TextEncoder,
    }
    encoders = [{"modality": name, **part} for name, union in by_modality.items() for part in _parts(union)]

    positions = [
        {"name": name, "about": about, "source": source, "made_by": made_by}
        for name, (about, source, made_by) in specs.POSITIONS.items()
    ]
    return {
        "encoders": encoders,
        "connectors": _parts(specs.Connector),
        "decoders": _parts(composition.Decoder),
        "fusions": _parts(fusion_specs.Fusion),
        "positions": positions,
        "objectives": [
            *({**part, "where": objectives.Part.where} for part in _parts(objectives.Objective)),
            *({"name": name, **found._asdict(), "settings": []} for name, found in objectives.ELSEWHERE.items()),
        ],
        "optimizers": _parts(optim.Optimizer),
        "schedules": _parts(schedule.Schedule),
        "recipes": _recipes(),
    }


def _recipes() -> list[dict[str, Any]]:
    """The shipped ones, by the comment that begins each."""
    from plait.recipes.recipe import shipped

    found: list[dict[str, Any]] = []
    for name, path in sorted(shipped().items()):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found.append({"name": name, "about": first.lstrip("# ").rstrip("."), "source": "", "made_by": str(path)})
    return found


def _parts(union: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": part.model_fields["kind"].default,
            "about": (part.__doc__ or "").partition("\n")[0].rstrip("."),
            "source": part.source,
            "made_by": f"{part.__module__}.{part.__name__}",
            "settings": [
                {"name": name, "default": part().model_dump(mode="json")[name], "about": field.description}
                for name, field in part.model_fields.items()
                if name != "kind"
            ],
        }
        for part in get_args(get_args(union)[0])
    ]
