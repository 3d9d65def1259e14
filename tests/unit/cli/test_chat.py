"""``plait chat``: the answer alone on stdout, a loop that survives bad pictures, and faults that say what to do."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plait.assembly.multimodal import save_multimodal
from plait.cli import chat
from plait.cli.main import VERBS
from plait.cli.main import main as plait
from plait.core.types import MediaRef, Request, Text, Turn
from plait.inference.build import build_engine, encode_pictures

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tiny_model, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_multimodal(tiny_model, folder)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def run(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the verb on the tiny model with words and lines of stdin: exit code, stdout, stderr."""
    monkeypatch.setitem(VERBS, "chat", "ask")

    def run(*words: object, lines: str = "", name: object = model) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = plait(["chat", str(name), *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def terminal(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same at a terminal: what is typed, line by line; an exception in the place of a line is raised there."""
    monkeypatch.setitem(VERBS, "chat", "ask")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def run(*typed: object, words: tuple[object, ...] = ()) -> tuple[int, str, str]:
        left: Iterator[object] = iter(typed)

        def read(prompt: str) -> str:
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return str(line)

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", read)
        code = plait(["chat", str(model), "--max-tokens", "6", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def expected(tiny_model, picture: Path | None, *turns: str, tokens: int = 6) -> str:
    """What the engine says to the questions and answers so far."""
    ref = MediaRef(modality="image", sha256="0", uri="a.png")
    made = [Turn(role="assistant" if n % 2 else "user", parts=(Text(text=text),)) for n, text in enumerate(turns)]
    if picture is not None:
        made[0] = Turn(role="user", parts=(ref, Text(text=turns[0])))
    engine = build_engine(tiny_model, encode_pictures(tiny_model, lambda _: picture.read_bytes() if picture else b""))
    return engine([Request(id="r", turns=tuple(made), max_new_tokens=tokens)])[0].text


def test_one_question_gets_one_answer_on_stdout_and_nothing_else(run: Run, tiny_model, picture: Path) -> None:
    wanted = expected(tiny_model, picture, "what?")
    code, out, err = run("--image", picture, "--prompt", "what?", "--max-tokens", 6)
    assert (code, out) == (0, wanted + "\n")
    assert err.startswith("loading ")
    assert "no picture" not in err
    code, out, _ = run("--image", picture, "--prompt", "what?", "--max-tokens", 6, "--json")
    record = json.loads(out)
    assert (code, record["answer"]) == (0, wanted)
    assert record["finish"] in ("stop", "length")
    assert record["image_tokens"] == tiny_model.slots_per_picture < record["prompt_tokens"]
    assert record["seconds"] > 0


def test_lines_of_stdin_are_one_conversation(run: Run, tiny_model, picture: Path) -> None:
    first = expected(tiny_model, None, "one")
    second = expected(tiny_model, None, "one", first, "two")
    shown = expected(tiny_model, picture, "three")
    lines = f"one\n\n two \n/new\n/image {picture}\nthree\n/new\nthree\n/quit\nnever\n"
    code, out, err = run("--max-tokens", 6, lines=lines)
    assert (code, out) == (0, f"{first}\n{second}\n{shown}\n{shown}\n")
    assert err.count("no picture: the question goes as text alone") == 1
    code, out, _ = run("--max-tokens", 6, "--json", lines=lines)
    assert [record["answer"] for record in json.loads(out)] == [first, second, shown, shown]


def test_stdin_stops_at_the_first_fault(run: Run) -> None:
    code, _, err = run(lines="/image none.png\nwhat?\n")
    assert code == 4
    assert "cannot find the file" in err


def test_at_a_terminal_bad_pictures_and_bad_commands_do_not_end_it(terminal: Run, tiny_model, picture: Path) -> None:
    for name, data in (("empty.png", b""), ("cut.png", picture.read_bytes()[:200]), ("text.png", b"words")):
        (picture.parent / name).write_bytes(data)
    bad = [f"/image {picture.parent / name}" for name in ("empty.png", "cut.png", "text.png", "none.png", ".")]
    code, out, err = terminal(*bad, "/foo", "/image", "x" * 400, "/help", "", f"/image {picture}", "what?")
    assert code == 0
    assert expected(tiny_model, picture, "what?") in out
    for cause in ("0 bytes", "cut off", "not a picture", "cannot find", "not a regular file", "more than the 256"):
        assert f": {cause}" in err or cause in err, cause
    assert err.count("error [") == 8
    assert "/quit" in err
    assert "Traceback" not in err


def test_pictures_that_decoding_changes_are_said(terminal: Run, picture: Path) -> None:
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 200)]
    frames[0].save(picture.parent / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].convert("CMYK").save(picture.parent / "a.jpg")
    code, _, err = terminal(f"/image {picture.parent / 'a.gif'}", "?", f"/image {picture.parent / 'a.jpg'}", "?")
    assert code == 0
    assert "only the first frame" in err
    assert "CMYK" in err
    assert "error [" not in err


def test_ctrl_c_stops_the_answer_and_at_the_prompt_ends(terminal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write, broken = chat._write, []

    def interrupted(text: str) -> None:
        write(text)
        if text.strip() and not broken:
            broken.append(text)
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_write", interrupted)
    code, out, err = terminal("one", "two", KeyboardInterrupt(), "three")
    assert code == 130
    assert "stopped; Ctrl-C again ends" in err
    answers = out.split("\n\n")
    assert broken[0] in answers[0]
    assert len([answer for answer in answers if answer.strip()]) == 2  # the second question was answered, no third


def test_control_characters_of_an_answer_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for screen, wanted in ((Terminal(), "\\x1b[2Jhi\\x07\n"), (io.StringIO(), "\x1b[2Jhi\x07\n")):
        monkeypatch.setattr(sys, "stdout", screen)
        chat._write("\x1b[2Jhi\x07\n")
        assert screen.getvalue() == wanted


def test_pictures_outside_the_allowed_folder_are_refused(run: Run, picture: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(picture)
    for path in (picture, inside / "link.png", inside / ".." / picture.name):
        code, _, err = run("--image", path, "--allow-root", inside, "--prompt", "?")
        assert code == 4
        assert "outside the allowed folder" in err
    assert run("--image", picture, "--allow-root", tmp_path, "--prompt", "?", "--max-tokens", 1)[0] == 0
    code, _, err = run("--image", picture, "--allow-root", tmp_path / "none", "--prompt", "?")
    assert code == 2
    assert "no folder" in err


@pytest.mark.parametrize(
    ("words", "code", "cause"),
    [
        (("--prompt", "x" * 300), 4, "that is 64 more than the 256"),
        (("--prompt", "x", "--max-tokens", 1000), 4, "more than the 256"),
        (("--prompt", " "), 2, "the question is empty"),
        (("--prompt", "\udcff"), 2, "not UTF-8"),
        (("--prompt", "x", "--max-tokens", 0), 2, "0 is less than 1"),
        (("--prompt", "x", "--temperature", "nan"), 2, "not a temperature"),
    ],
)
def test_what_cannot_be_asked_is_refused(run: Run, words: tuple[object, ...], code: int, cause: str) -> None:
    found, out, err = run(*words)
    assert (found, out) == (code, "")
    assert cause in err
    assert "fix:" in err


def test_json_at_a_terminal_needs_a_question(terminal: Run) -> None:
    code, out, _ = terminal(words=("--json",))
    assert code == 2
    assert "--json needs a question" in json.loads(out)["error"]["cause"]


def test_a_model_that_is_none_is_said_before_anything_loads(run: Run, tmp_path: Path) -> None:
    code, _, err = run("--prompt", "x", name=tmp_path / "none")
    assert code == 2
    assert "loading" not in err


def test_parsing_the_arguments_needs_no_model() -> None:
    parser = argparse.ArgumentParser()
    chat.add(parser)
    args = parser.parse_args(["runs/x", "--image", "a.png", "--image", "b.png"])
    assert (args.model, args.image) == ("runs/x", ["a.png", "b.png"])
    assert parser.parse_args([]).model == "latest"
