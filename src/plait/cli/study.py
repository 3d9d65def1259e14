"""``plait study NAME``: try a claim of the field on small models, and publish what comes out."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from plait.cli.output import Out

if TYPE_CHECKING:
    from plait.studies.study import Study

STUDIES = {
    # Position codes on longer sequences and larger grids than they were trained at.
    "positions": "plait.studies.positions:Positions",
    # Fusions of two modalities where they interact, differ in scale, or one is missing.
    "fusion": "plait.studies.fusion:FusionStudy",
    # Fusion by attention, looked at: answers, maps, and what it costs.
    "attention": "plait.studies.attention:AttentionStudy",
    # Attention over distances, norms and residuals, several heads.
    "transformer": "plait.studies.transformer:TransformerStudy",
    # Projections, queries and layers inside the decoder between the same frozen tower and decoder.
    "connectors": "plait.studies.connectors:ConnectorStudy",
    # Four picture towers of equal operations: data, moves, details, the whole, alignment, layers.
    "encoders": "plait.studies.encoders:Encoders",
    # Features aligned across domains whose look, or whose shares of classes, differ.
    "domain-shift": "plait.studies.domains:DomainShift",
    # Training itself: memory, number formats, little data, rates by layer, orders of modalities.
    "training": "plait.studies.training:TrainingStudy",
}
"""Name → settings that run."""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("study", choices=tuple(STUDIES), help="which claims to try")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted settings, such as seeds=3"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/studies"),
        metavar="FOLDER",
        help="where folders of studies go (default: runs/studies)",
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Run the study and print its tables."""
    from plait.cli.panel import watch

    with watch(quiet_stdout=out.json) as listener:
        import json

        from plait.core.events import Events
        from plait.core.files import lock, new_run
        from plait.core.spec import resolve
        from plait.core.yamltext import Node, Source
        from plait.recipes.run import environment

        resolved = resolve(_study(args.study), Node({}, Source("default")), args.overrides)
        contents = {"study.yaml": resolved.to_yaml(), "env.json": json.dumps(environment(), indent=2) + "\n"}
        folder = new_run(args.study, args.runs, contents=contents)
        with lock(folder):
            events = Events(folder / "events.jsonl", listeners=(listener,))
            results = resolved.spec.run(folder, events=events)
    out.line()
    out.line(resolved.spec.markdown(results))
    out.line(f"{results['trained']} trainings in {results['seconds']:.0f} s; folder {folder}")
    out.result({"folder": str(folder), **results})
    return 0


def _study(name: str) -> type[Study]:
    """Settings that run; imported only now, as torch comes with them."""
    module, _, kind = STUDIES[name].partition(":")
    found: type[Study] = getattr(import_module(module), kind)
    return found
