"""``plait chat MODEL``: ask a model about pictures, sounds and videos, in the terminal.

The answer alone goes to stdout; everything about it goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.cli.output import Out
from plait.core.errors import DataError, PlaitError, Stopped, UsageError

if TYPE_CHECKING:
    from plait.core.types import MediaRef, Modality
    from plait.data.frames import Sampling
    from plait.inference.converse import Attachments, Conversation

_HELP = """\
/image PATH  the picture of your next question
/sound PATH  the sound of your next question (WAV, at the model's own rate)
/video PATH  the video of your next question
/new         forget the conversation, keep the picture
/help        this
/quit        end (or Ctrl-D); Ctrl-C stops an answer, and at the prompt ends"""

_SHOW: dict[str, tuple[Modality, str]] = {
    "/image": ("image", "picture"),
    "/sound": ("audio", "sound"),
    "/video": ("video", "video"),
}

# What a terminal would obey and not show: all control characters but tab and newline.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "model",
        nargs="?",
        default="latest",
        help="a run (default: the latest), a stage's folder, a checkpoint, or a folder of Hugging Face's",
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="picture of the first question; may be repeated"
    )
    parser.add_argument("--sound", action="append", default=[], metavar="PATH", help="sound of the first question")
    parser.add_argument("--video", action="append", default=[], metavar="PATH", help="video of the first question")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once and end; else ask, or read lines of stdin")
    parser.add_argument("--max-tokens", type=_positive, metavar="N", help="most tokens of an answer (default: 256)")
    parser.add_argument("--temperature", type=_not_negative, default=0.0, metavar="T", help="0 (default): likeliest")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling above temperature 0 (default: 0)")
    parser.add_argument(
        "--allow-root", type=Path, metavar="DIR", help="refuse pictures and other media outside this folder"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Answer once, or until the questions end."""
    interactive = args.prompt is None and sys.stdin.isatty()
    _check(args, out, interactive=interactive)
    desk = _prepare(args)
    if args.prompt is not None:
        out.result(desk.answer(args.prompt, show=not out.json))
    elif interactive:
        _converse(desk)
    else:
        out.result([desk.answer(line, show=not out.json) for line in _lines(desk)])
    return 0


@dataclass(slots=True, kw_only=True)
class Desk:
    """Where questions are put and pictures are shown.

    Attributes:
        conversation: With the model.
        pictures: Bytes of what was shown.
        root: Folder that media must be in; None allows every readable file.
        sampling: Which frames of a video the model looks at, where that is known.
        told: Whether it was said that a question goes without a picture.
    """

    conversation: Conversation
    pictures: Attachments
    root: Path | None
    sampling: Sampling | None = None
    told: bool = False

    def show(self, path: str, modality: Modality = "image") -> None:
        """Make a picture, sound or video the one of the next question; what there is of other kinds stays.

        Raises:
            MediaError: It is refused.
            DataError: The model does not read such media.
        """
        shown = _open(path, self.root, self.pictures, modality=modality)
        self.check(shown)
        others = [ref for ref in self.conversation.pictures if ref.modality != modality]
        self.conversation.pictures = [*others, shown]

    def check(self, shown: MediaRef) -> None:
        """See that the model takes it, or every question from now on would be refused.

        Raises:
            DataError: It reads no such media, or not at this rate or length.
        """
        from plait.inference.converse import user_turn

        engine = self.conversation.engine
        engine.render([user_turn([shown])])
        if shown.modality != "image":  # of pictures the size is all that could be wrong
            engine.media([shown])
        if shown.modality == "video" and self.sampling is not None and shown.length:
            seen = self.sampling.indices(shown.length)
            many = f"{len(set(seen)):,} of {shown.length:,} frames" if len(set(seen)) < shown.length else "every frame"
            last = "" if self.sampling.policy == "uniform" else f", frame {seen[-1] + 1:,} is the last of them"
            _say(f"{shown.uri}: {many} of the video will be looked at{last}")

    def answer(self, question: str, *, show: bool) -> dict[str, Any]:
        """Answer a question, on stdout as it comes if ``show``.

        Raises:
            ContextError: The conversation is too long.
            UsageError: The question is empty or no text.
        """
        from plait.inference.converse import next_piece

        _check_question(question)
        conversation = self.conversation
        if not conversation.pictures and not conversation.turns and not self.told:
            self.told = True
            _say("no picture: the question goes as text alone (--image PATH or /image PATH gives one)")
        begun = time.monotonic()
        said: list[str] = []
        completion = None
        with contextlib.closing(conversation.ask(question)) as pieces:
            while completion is None:
                piece = next_piece(pieces)
                if isinstance(piece, str):
                    said.append(piece)
                    _write(piece if show else "")
                else:
                    completion = piece
        _write("\n" if show else "")
        if completion.finish == "length":
            _say(f"the answer was ended at {len(completion.token_ids):,} tokens (--max-tokens)")
        return {
            "question": question,
            "answer": "".join(said),
            "prompt_tokens": completion.prompt_tokens,
            "image_tokens": completion.image_tokens,
            "finish": completion.finish,
            "seconds": round(time.monotonic() - begun, 3),
        }


# --- the loop at a terminal ------------------------------------------------------------------------------------------


def _converse(desk: Desk) -> None:
    """Ask at the prompt until the person ends it; faults are said, and it goes on."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives the prompt editing and history

    _say("type a question; /help lists the commands")
    while True:
        _write("\n")
        try:
            line = input("> ").strip()
        except EOFError:
            _say("")
            return
        try:
            if line == "/quit":
                return
            if line and not _command(desk, line):
                _answer_stoppably(desk, line)
        except PlaitError as fault:
            _say(f"error [{fault.code}]: {fault}")


def _answer_stoppably(desk: Desk, question: str) -> None:
    try:
        desk.answer(question, show=True)
    except Stopped:  # SIGTERM ends it all
        raise
    except KeyboardInterrupt:
        _write("\n")
        _say("stopped; Ctrl-C again ends")
    except DataError:
        if desk.conversation.turns:
            _say("/new forgets the conversation so far, which counts too")
        raise


def _command(desk: Desk, line: str) -> bool:
    """Obey a line that begins with a slash; says whether it was one.

    Raises:
        UsageError: There is no such command.
    """
    if not line.startswith("/"):
        return False
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word in _SHOW and rest:
        modality, what = _SHOW[word]
        desk.show(rest, modality)
        _say(f"{what}: {rest}")
    elif word == "/new":
        desk.conversation.forget()
        _say("a new conversation" + (", with what was shown last" if desk.conversation.pictures else ""))
    elif word == "/help":
        _say(_HELP)
    else:
        raise UsageError(f"cannot obey {line!r}", remedy="/image PATH, /sound PATH, /video PATH, /new, /help or /quit")
    return True


def _lines(desk: Desk) -> Iterator[str]:
    """Questions on stdin, a line each; commands work as at the prompt, but a fault ends it.

    Raises:
        DataError: A line is not UTF-8.
    """
    try:
        for line in map(str.strip, sys.stdin):
            if line == "/quit":
                return
            if line and not _command(desk, line):
                yield line
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", place="stdin", remedy="convert the questions to UTF-8") from error


# --- before the first question ---------------------------------------------------------------------------------------


def _check(args: argparse.Namespace, out: Out, *, interactive: bool) -> None:
    if out.json and interactive:
        raise UsageError(
            "--json needs a question", place="plait chat", remedy="give --prompt TEXT, or questions on stdin"
        )
    if args.prompt is not None:
        _check_question(args.prompt)
    if args.allow_root is not None and not args.allow_root.is_dir():
        raise UsageError(f"no folder {str(args.allow_root)!r}", place="--allow-root", remedy="name an existing folder")


def _check_question(question: str) -> None:
    if not question.strip():
        raise UsageError("the question is empty", place="plait chat", remedy="ask something")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the question is not UTF-8", place="plait chat", remedy="convert it to UTF-8") from error


def _prepare(args: argparse.Namespace) -> Desk:
    """Find the model, look at the media, and only then load what takes seconds."""
    from plait.inference.load import find_model_folder, load

    folder = find_model_folder(args.model, args.runs)
    _say(f"loading {folder}")
    from plait.inference.converse import Attachments, Conversation, Decoding

    pictures = Attachments()
    given: list[tuple[Modality, list[str]]] = [("image", args.image), ("audio", args.sound), ("video", args.video)]
    shown = [_open(path, args.allow_root, pictures, modality=kind) for kind, paths in given for path in paths]
    begun = time.monotonic()
    from plait.assembly.multimodal import Multimodal
    from plait.inference.wrapped import engine_for

    model = load(folder, say=_say)
    engine = engine_for(model, pictures.read)
    video = model.video if isinstance(model, Multimodal) else None
    decoding = Decoding(max_new_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    _say(f"ready in {time.monotonic() - begun:.1f} s")
    conversation = Conversation(engine=engine, decoding=decoding, pictures=shown)
    sampling = None if video is None else video.sampling
    desk = Desk(conversation=conversation, pictures=pictures, root=args.allow_root, sampling=sampling)
    for ref in shown:
        desk.check(ref)
    return desk


def _open(path: str, root: Path | None, pictures: Attachments, *, modality: Modality) -> MediaRef:
    """Read and check a picture, sound or video, saying what decoding changed.

    Raises:
        MediaError: It is not there, outside the allowed folder, or not usable.
    """
    from plait.data.media import Limits, read_media
    from plait.inference.converse import MAX_BYTES

    # Relative to where the person stands, even where an allowed folder is named.
    full = Path.cwd() / Path(path).expanduser()
    limits = Limits(max_bytes=MAX_BYTES[modality])
    data = read_media(full, allowed_root=root if root is not None else Path(full.anchor), limits=limits)
    if modality == "audio":
        return pictures.add_sound(data, place=path)
    if modality == "video":
        return pictures.add_video(data, place=path)
    ref, changes = pictures.add(data, place=path)
    for change in changes:
        _say(f"{path}: {change}")
    return ref


# --- words -----------------------------------------------------------------------------------------------------------


def _write(text: str) -> None:
    sys.stdout.write(text.translate(_CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a temperature: 0 or more")
    return number
