"""The command line: exit codes, one-line faults, JSON, help without heavy imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plait.cli.main import VERBS, build_parser, main
from plait.core.errors import NumericsError, PlaitError

pytestmark = pytest.mark.light


def test_every_verb_has_help_and_the_common_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as done:
            build_parser().parse_args([verb, "--help"])
        assert done.value.code == 0
        text = capsys.readouterr().out
        assert "--json" in text
        assert "exit codes" in text


def test_no_verb_prints_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "VERB" in capsys.readouterr().out


def test_usage_faults_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2
    assert "see `plait run --help`" in capsys.readouterr().err
    assert main(["run", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "a", "b"], "`plait runs compare`"),
        (["plann"], "did you mean 'plan'?"),
        (["list", "encoder"], "did you mean 'encoders'?"),
    ],
)
def test_what_an_unknown_verb_may_have_meant_is_said(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_typo_in_a_recipe_exits_3_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstat"]) == 3
    assert "did you mean 'quickstart'" in capsys.readouterr().err
    assert main(["run", "quickstart", "data.sourse=emoji", "--json"]) == 3
    captured = capsys.readouterr()
    fault = json.loads(captured.out)["error"]
    assert fault["exit_code"] == 3
    assert "data.source" in fault["remedy"] + fault["cause"]


def test_a_bug_exits_1_in_one_line_and_debug_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> int:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("plait.cli.runs.main", broken)
    assert main(["runs"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in err
    assert "Traceback" not in err
    with pytest.raises(ZeroDivisionError):
        main(["runs", "--debug"])


def test_settings_may_stand_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", "--runs", "elsewhere", "data.sourse=x"]) == 3
    assert "data.source" in capsys.readouterr().err
    assert main(["run", "quickstart", "--rums", "elsewhere"]) == 2
    assert "unrecognized arguments: --rums" in capsys.readouterr().err


def test_faults_print_cause_place_and_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(*_: object) -> int:
        raise NumericsError("loss is nan", place="step 7", remedy="lower the rate")

    monkeypatch.setattr("plait.cli.runs.main", faulty)
    assert main(["runs"]) == 6
    assert capsys.readouterr().err.splitlines() == [
        "error [numerics]: loss is nan",
        "  where: step 7",
        "  fix:   lower the rate",
    ]


def test_exit_codes_are_distinct() -> None:
    codes = {c.exit_code: c.code for c in PlaitError.__subclasses__()}
    assert codes == {2: "usage", 3: "config", 4: "data", 5: "resource", 6: "numerics", 7: "checkpoint"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_exit_with_their_codes(tmp_path: Path, number: signal.Signals, code: int) -> None:
    program = (
        "import sys, time, plait.cli.runs as verb\n"
        "def wait(*_):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "verb.main = wait\n"
        "sys.argv = ['plait', 'runs']\nfrom plait.cli.main import entry\nentry()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert err.strip() == {130: "interrupted", 143: "terminated"}[code]
    assert "Traceback" not in err + out


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    command = f"{sys.executable} -m plait rows --json | head -c 10; exit ${{PIPESTATUS[0]}}"
    root = Path(__file__).parents[3]
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_runs_may_stand_after_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words in (["runs", "show", "--json", "mine"], ["runs", "compare", "--json", "one", "two"]):
        assert main([*words, "--runs", str(tmp_path)]) != 0
        assert "no run" in capsys.readouterr().out
