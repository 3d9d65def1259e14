"""``report.html``: one page about a run, made from the files of its folder alone, complete in itself.

It asks nothing of the network: pictures, style and scripts are in it, and its Content-Security-Policy forbids the rest
(https://www.w3.org/TR/CSP3/), so that text of a data set can never become code: only scripts with these digests run.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from plait.core.files import write_atomic
from plait.report.charts import MISSING, Charts, plotly_source
from plait.report.folder import RunFolder, moment
from plait.report.markup import Html, alert, duration, el, fold, join, mebibytes, number, origin
from plait.report.model_sections import chat_command
from plait.report.sections import draw_stage, facts_list, sentences

NAME = "report.html"

_ALERTS = 50  # shown one by one; the rest are counted


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder: of a finished run, a stopped one, or one still at work.

    What is damaged or missing is said in the page; the same files give the same page.

    Args:
        run: The run folder.

    Returns:
        The page.

    Raises:
        ResourceError: The disk is full or not writable; an older page is untouched.
        OSError: The folder is not there.
    """
    path = run / NAME
    write_atomic(path, render(RunFolder(run.resolve())))
    return path


def render(run: RunFolder) -> str:
    """The page as text."""
    plotly = plotly_source()
    charts = Charts(drawn=plotly is not None)
    # Sections come first, because reading them finds the faults that are told above them.
    sections = [draw_stage(run, stage, charts) for stage in run.stages]
    body = join(_head(run), _alerts(run, drawn=charts.drawn), _timeline(run), el("main", sections), _recipe(run))
    return document(
        f"{run.path.name} – Plait", join(body, _foot(run)), plotly if charts.figures else None, charts=charts
    )


# --- parts of the page -----------------------------------------------------------------------------------------------


def _program(path: str) -> list[str]:
    """What a person types for a program: ``python -m plait`` is known to itself by the file that it runs."""
    name = Path(path).name
    return ["python", "-m", Path(path).parent.name] if name == "__main__.py" else [name]


def _head(run: RunFolder) -> Html:
    env = run.env
    versions = env.get("versions")
    torch = versions.get("torch") if isinstance(versions, dict) else None
    begun = min((stage.begun for stage in run.stages if stage.begun), default=0.0)
    command = env.get("command")
    words = [str(word) for word in command] if isinstance(command, list) else []
    several = env.get("processes")
    facts = {
        "time in all": duration(sum((stage.seconds for stage in run.stages), 0.0)),
        "stages done": f"{sum(stage.state == 'done' for stage in run.stages)} of {len(run.stages)}",
        "begun": _clock(begun),
        "last event": _clock(run.time),
        "seed": number(run.seed),
        "versions": f"Plait {env.get('plait', '–')}, Python {env.get('python', '–')}, torch {torch or '–'}",
        "machine": str(env.get("platform", "–")),
        "cores and threads": f"{number(env.get('cores'))} and {number(env.get('threads'))}",
        **({"processes": number(several)} if isinstance(several, int) and several > 1 else {}),
        "command": shlex.join([*_program(words[0]), *words[1:]]) if words else "–",
    }
    results = [
        el(
            "li",
            el("a", stage.name.capitalize(), attrs={"href": f"#stage-{stage.path.name}"}),
            [el("p", line) for line in sentences(run, stage)],
            origin(f"{stage.path.name}/done.json" if stage.state == "done" else "events.jsonl"),
        )
        for stage in run.stages
    ]
    finished = run.state == "finished"
    verb, why = ("runs show", "Show it in the terminal") if finished else ("resume", "Go on where it ended")
    return el(
        "header",
        el("p", f"Run of the recipe {run.recipe}", cls="eyebrow"),
        el("h1", run.path.name, " ", el("span", run.state, cls=f"tag {run.state}")),
        el("ul", results, cls="results"),
        el("p", "Talk with the model: ", el("code", chat), cls="next") if (chat := chat_command(run)) else None,
        el("p", f"{why}: ", el("code", f"plait {verb} {shlex.quote(run.path.name)}"), cls="next"),
        facts_list(facts),
        fold("All versions", facts_list({str(k): str(v) for k, v in versions.items()}), origin("env.json"))
        if isinstance(versions, dict)
        else None,
    )


def _alerts(run: RunFolder, *, drawn: bool) -> Html | None:
    """Warnings and errors, in the open."""
    found: list[Html] = [alert(text, kind="warning") for text in run.faults]
    if not drawn:
        found.append(alert(f"plotly is not installed, so there are tables in place of charts: {MISSING}", kind="note"))
    loud = [event for event in run.events if event.get("kind") in ("warning", "error")]
    for event in loud[-_ALERTS:]:
        said = f"{_clock(moment(event))}: {event.get('text', '')}"
        if event["kind"] == "error":
            said = " | ".join([said, *(f"{k}: {event[k]}" for k in ("cause", "place", "remedy") if event.get(k))])
        found.append(alert(said, kind=str(event["kind"]), origin_file="events.jsonl"))
        if event.get("trace"):
            found.append(fold("Where in the code", el("pre", str(event["trace"]), attrs={"tabindex": "0"})))
    if len(loud) > _ALERTS:
        found.append(alert(f"{len(loud) - _ALERTS:,} earlier ones are in events.jsonl", kind="warning"))
    return el("section", el("h2", "What to look at"), found) if found else None


def _timeline(run: RunFolder) -> Html:
    longest = max((stage.seconds for stage in run.stages), default=0.0) or 1.0
    rows: list[Html] = []
    for stage in run.stages:
        share = f"width:{100 * stage.seconds / longest:.1f}%"
        again = f" ({stage.attempts} starts)" if stage.attempts > 1 else ""
        time = "not begun" if stage.state == "waiting" else duration(stage.seconds) + again
        # A bar without a length would still show its least width.
        bar = el("span", attrs={"style": share}) if stage.seconds else None
        name = el("a", stage.path.name, attrs={"href": f"#stage-{stage.path.name}"})
        size = None if stage.state == "waiting" else el("span", f" · {mebibytes(run.size(stage))}", cls="quiet")
        rows.append(el("li", name, el("div", bar, cls="bar"), el("span", time, size, cls="time")))
    return el(
        "section",
        el("h2", "Time and size on disk"),
        el("ol", rows, cls="timeline"),
        origin("events.jsonl"),
    )


def _recipe(run: RunFolder) -> Html | None:
    if not run.recipe_text:
        return None
    text = el("pre", run.recipe_text, attrs={"tabindex": "0"})
    return el("section", el("h2", "Recipe"), fold("Every setting and where it came from", text, origin("recipe.yaml")))


def _foot(run: RunFolder) -> Html:
    asof = f"the folder as it was after {_clock(run.time)}" if run.time else "a folder without events"
    return el("footer", el("p", f"Made by Plait from {asof}. Files named in small type lie beside this page."))


def document(title: str, body: Html, plotly: str | None, *, charts: Charts) -> str:
    """A whole page around its body: style, figures and scripts in it, and nothing from elsewhere.

    Args:
        title: Of the window.
        body: Of the page.
        plotly: The text of plotly.js; None where the page has no figure.
        charts: Of the page.
    """
    style = _part("page.css")
    scripts = [plotly, _part("page.js")] if plotly else []
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = join(
        el("meta", attrs={"charset": "utf-8"}),
        el("meta", attrs={"http-equiv": "Content-Security-Policy", "content": policy}),
        el("meta", attrs={"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        el("meta", attrs={"name": "referrer", "content": "no-referrer"}),
        el("title", title),
        Html(f"<style>\n{style}</style>"),
    )
    data = f'<script type="application/json" id="figures">{charts.data()}</script>' if scripts else ""
    code = "\n".join(f"<script>{text}</script>" for text in scripts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n{data}\n{code}\n</body>\n</html>\n'


def _part(name: str) -> str:
    return (resources.files("plait.report") / name).read_text(encoding="utf-8")


def _clock(time: float) -> str:
    """UTC, to the minute."""
    try:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC" if time else "–"
    except (OverflowError, OSError, ValueError):
        return "–"
