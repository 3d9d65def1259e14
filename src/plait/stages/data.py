"""The data stage: raw pictures and names to verified shards, questions about them, a ledger and a card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from plait.core.estimate import Estimate, Machine
from plait.core.events import Events
from plait.core.spec import Spec
from plait.stages.stage import Stage
from plait.stages.voices import Voices

if TYPE_CHECKING:
    from plait.core.types import Sample
    from plait.data.ledger import Ledger
    from plait.data.shards import Entry
    from plait.data.sources import Gathered
    from plait.data.sources.emoji import EmojiChoice
    from plait.data.sources.pairs import PairsChoice
    from plait.data.spoken import Aloud, Spoken


_MOST_HELD_OUT = 0.5


class EmojiSource(Spec):
    """Twemoji for training and OpenMoji as the unseen style, with English and Chinese names."""

    kind: Literal["emoji"] = "emoji"
    """Which source this is."""
    held_out: int = Field(default=300, ge=1, le=1000)
    """Concepts that are never trained on, to test with."""
    validation: int = Field(default=0, ge=0, le=1000)
    """More such concepts, in the training style, to judge training by while it goes on (`trainer.validation` of the
    stages); 0 holds none out. The tests stay as they are, but that one in another style never shows these."""
    size: int = Field(default=72, ge=16, le=512)
    """Pixels to which OpenMoji is rendered; Twemoji has 72."""
    variants: Literal["one", "all"] = "one"
    """One default picture a concept, or all skin tones and genders; they always stay in one split."""
    flags: bool = False
    """Take the flags of countries and regions too."""
    max_train: int | None = Field(default=None, ge=2)
    """Train on at most this many pictures; the rest is counted in the ledger."""
    max_test: int | None = Field(default=200, ge=1)
    """At most this many pictures in each test split; the rest is counted in the ledger."""


class PairsSource(Spec):
    """Your own pictures with texts: a CSV file (image,text) or a folder of pictures with captions."""

    kind: Literal["pairs"] = "pairs"
    """Which source this is."""
    path: Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
    """CSV file with the columns image and text, or a folder: captions.jsonl, metadata.csv, or one .txt file a
    picture."""
    root: Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())] | None = None
    """Pictures must lie inside this folder; by default the folder of the CSV file, or the folder itself."""
    licence: str = Field(default="unknown", min_length=1)
    """Licence of the pictures and texts, for the card."""
    test_fraction: float = Field(default=0.1, ge=0.0, le=0.5)
    """Share of the rows that is held out to test with; rows with a common picture or text stay together."""
    validation: float = Field(default=0.0, ge=0.0, le=0.5)
    """Share of the rows that is held out likewise, to judge training by while it goes on (`trainer.validation` of the
    stages); 0 holds none out. The test stays as it is."""
    min_rows: int = Field(default=16, ge=1)
    """Fewer usable rows than this are an error."""
    max_megapixels: float = Field(default=50.0, gt=0.0, le=89.0)
    """Pictures with more pixels are refused before they are decoded."""
    max_train: int | None = Field(default=None, ge=2)
    """Train on at most this many rows; the rest is counted in the ledger."""
    max_test: int | None = Field(default=200, ge=1)
    """Test on at most this many rows; the rest is counted in the ledger."""

    @model_validator(mode="after")
    def _rest(self) -> PairsSource:
        if self.test_fraction + self.validation > _MOST_HELD_OUT:
            raise ValueError(
                f"test_fraction {self.test_fraction:g} and validation {self.validation:g} hold out more than half of "
                "the rows; lower one of them"
            )
        return self


class SpokenQuestions(Voices):
    """Questions asked aloud: the sound takes the place of the text. Needs the extra `speech` (espeak-ng)."""

    takes: int = Field(default=2, ge=1, le=100)
    """In how many ways, each with its voice and speed, one text is spoken at most: more of them are more to encode."""
    share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the questions that is spoken; the others stay written."""
    tasks: tuple[str, ...] = ()
    """Only questions of these tasks are spoken; by default of all."""
    max_seconds: float = Field(default=20.0, gt=0.0, le=600.0)
    """Questions that take longer stay written, and are counted."""


class Questions(Spec):
    """Which questions are made from the pictures."""

    chinese: bool = True
    """Ask for the Chinese name too, where it is known."""
    yes_no: int = Field(default=1, ge=0, le=8)
    """Rounds of yes/no questions; each asks of each picture once with its name and once with a wrong one that is hard:
    a similar thing's name."""
    yes_no_easy: int = Field(default=1, ge=0, le=8)
    """More rounds with any wrong name, in the training split only."""
    groups: bool = True
    """Ask for the group, where it is known."""
    canvases: int = Field(default=300, ge=0)
    """Canvases of one to three training pictures, to ask what is left, right, above, and how many; not made from own
    data."""
    test_canvases: int = Field(default=40, ge=0)
    """The same for each test split."""
    spoken: SpokenQuestions | None = None
    """Ask aloud; by default all questions are written. Chinese ones always are."""


AnySource: TypeAlias = Annotated[EmojiSource | PairsSource, Field(discriminator="kind")]
"""Every source there is."""


def _named_source(value: Any) -> Any:
    """A plain text names a source: ``emoji``, or the path of your own data."""
    if isinstance(value, (str, Path)):
        return {"kind": "emoji"} if str(value) == "emoji" else {"kind": "pairs", "path": value}
    return value


class Data(Stage):
    """Make shards, questions, ledger and data card.

    Writes ``ledger.jsonl``, ``card.md`` and ``shards/``: ``train``, ``test-concept``, ``test-style``, ``test-both`` as
    far as the source has them, ``validation`` if asked for, and ``instruct-<split>`` with the questions about each,
    spoken ones with their sound. The same settings give the same bytes; the seal has one digest over them,
    ``shards_sha256``. If the source has to be refused, the ledger is there all the same.

    Example:
        >>> Data(source="emoji").source.held_out
        300
    """

    # The checker cannot know that specs are frozen, so that narrowing a field is safe.
    kind: Literal["data"] = "data"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which stage this is."""
    source: Annotated[AnySource, BeforeValidator(_named_source, json_schema_input_type=AnySource | str)] = EmojiSource()
    """Where pictures and texts come from: `emoji`, or the path of a CSV file or folder of your own."""
    questions: Questions = Questions()
    """Which questions are made from the pictures."""
    max_fault_rate: float = Field(default=0.1, ge=0.0, le=1.0)
    """Stop if a larger share of the wanted rows is damaged, missing or without text."""

    def run(self, previous: Path | None, folder: Path, *, events: Events) -> Path:
        """Do the work; see :meth:`plait.stages.stage.Stage.run`.

        Raises:
            DataError: The source has too many faults, too few rows, or is not there.
            ResourceError: A package is not fetched, or the disk is full.
        """
        from plait.core.errors import DataError
        from plait.core.files import folder_atomic, mark_done, write_atomic
        from plait.data.card import make_card
        from plait.data.ledger import Ledger
        from plait.data.shards import shards_sha256

        _sweep(folder)
        aloud = self._aloud()
        if aloud:
            aloud.check()
        ledger = Ledger()
        try:
            gathered = self._gather(ledger, events)
        except DataError:
            ledger.stop()
            ledger.write(folder / "ledger.jsonl")  # says of each row what is wrong with it
            raise
        ledger.write(folder / "ledger.jsonl")
        ledger.check_faults(self.max_fault_rate)
        with folder_atomic(folder / "shards") as shards:
            pictures = _write_pictures(shards, gathered, events)
            spoken: dict[str, Spoken] = {}
            questions = self._write_questions(shards, pictures, events, aloud=aloud, spoken=spoken)
            size = sum(path.stat().st_size for path in shards.iterdir())
            digest = shards_sha256(shards)
        settings = self.model_dump(mode="json")
        card = make_card(
            settings=settings,
            gathered=gathered,
            ledger=ledger,
            pictures=pictures,
            questions=questions,
            spoken=spoken,
        )
        write_atomic(folder / "card.md", card)
        summary = _summary(gathered, ledger, pictures=pictures, questions=questions)
        summary |= {"shard_bytes": size, "shards_sha256": digest}
        summary |= {"spoken": {split: counts.as_dict() for split, counts in spoken.items()}} if spoken else {}
        events.note(_sentence(summary), **summary)
        mark_done(folder, kind=self.kind, previous=previous, summary=summary)
        return folder

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        """What the stage will need; see :meth:`plait.stages.stage.Stage.estimate`."""
        from plait.data.expect import expect_emoji, expect_pairs

        if isinstance(self.source, EmojiSource):
            expected = expect_emoji(self._emoji_choice(self.source))
            canvases = self.questions.canvases, self.questions.test_canvases
        else:
            expected = expect_pairs(self._pairs_choice(self.source))
            canvases = 0, 0
        asked = 1 + 2 * self.questions.yes_no
        asked += (self.questions.chinese + self.questions.groups) if isinstance(self.source, EmojiSource) else 0
        tile = self.source.size if isinstance(self.source, EmojiSource) else 0
        return expected.estimate(
            asked=asked,
            more_in_training=2 * self.questions.yes_no_easy,
            canvases=canvases,
            tile=tile,
            runtime_bytes=machine.runtime_bytes,
            spoken=self.questions.spoken.share if self.questions.spoken else 0.0,
        )

    # --- inside ----------------------------------------------------------------------------------------------------

    def _gather(self, ledger: Ledger, events: Events) -> Gathered:
        def listener(done: int, total: int) -> None:
            events.progress("pictures", done, total)

        if isinstance(self.source, EmojiSource):
            from plait.data.sources.emoji import gather_emoji

            return gather_emoji(self._emoji_choice(self.source), ledger, listener)
        from plait.data.sources.pairs import gather_pairs

        return gather_pairs(self._pairs_choice(self.source), ledger, listener)

    def _emoji_choice(self, source: EmojiSource) -> EmojiChoice:
        from plait.data.sources.emoji import EmojiChoice

        return EmojiChoice(**source.model_dump(exclude={"kind"}), seed=self.seed)

    def _pairs_choice(self, source: PairsSource) -> PairsChoice:
        from plait.data.media import Limits
        from plait.data.sources.pairs import PairsChoice

        return PairsChoice(
            path=source.path,
            root=source.root or (source.path if source.path.is_dir() else source.path.parent),
            licence=source.licence,
            test_fraction=source.test_fraction,
            validation=source.validation,
            min_rows=source.min_rows,
            limits=Limits(max_pixels=round(source.max_megapixels * 1e6)),
            max_train=source.max_train,
            max_test=source.max_test,
            seed=self.seed,
        )

    def _aloud(self) -> Aloud | None:
        from plait.data.spoken import Aloud

        return Aloud(**self.questions.spoken.model_dump(), seed=self.seed) if self.questions.spoken else None

    def _write_questions(
        self,
        shards: Path,
        pictures: Mapping[str, list[Sample]],
        events: Events,
        *,
        aloud: Aloud | None,
        spoken: dict[str, Spoken],
    ) -> dict[str, list[Sample]]:
        """Ask about each split with pictures and names of that split only."""
        from plait.data.instructions import ask_canvases, ask_groups, ask_names, ask_yes_no
        from plait.data.media import decode_image
        from plait.data.shards import ShardReader, write_shards
        from plait.data.sources import VALIDATION
        from plait.data.spoken import Spoken, ask_aloud

        written: dict[str, list[Sample]] = {}
        others = [samples for split, samples in pictures.items() if split != VALIDATION]
        groups = sorted({group for samples in others for s in samples if (group := s.answer("group"))})
        for done, (split, samples) in enumerate(pictures.items()):
            events.progress("questions", done, len(pictures))
            asked = ask_names(samples, chinese=self.questions.chinese, seed=self.seed)
            easy = self.questions.yes_no_easy if split == "train" else 0
            asked += ask_yes_no(samples, rounds=self.questions.yes_no, easy=easy, seed=self.seed)
            grouped = [sample for sample in samples if sample.answer("group") in groups]
            asked += ask_groups(grouped, groups, seed=self.seed) if self.questions.groups else []
            entries: list[Entry] = [(sample, {}) for sample in asked]
            if isinstance(self.source, EmojiSource):
                with ShardReader(shards, split) as reader:
                    entries += ask_canvases(
                        samples,
                        self.questions.canvases if split == "train" else self.questions.test_canvases,
                        tile=self.source.size,
                        seed=self.seed,
                        open_picture=lambda ref, reader=reader: decode_image(reader.media(ref), place=ref.uri),
                    )
            entries.sort(key=lambda entry: entry[0].id)
            uttered: Iterable[Entry] = entries
            if aloud:
                counts = spoken[split] = Spoken()
                uttered = ask_aloud(_told(entries, split, events), aloud, split=split, counts=counts)
            written[split] = write_shards(shards, f"instruct-{split}", uttered)
        events.progress("questions", len(pictures), len(pictures))
        return written


def _told(entries: Sequence[Entry], split: str, events: Events) -> Iterable[Entry]:
    """The entries, with progress: speaking takes longer than all else."""
    for done, entry in enumerate(entries, 1):
        yield entry
        if done % 100 == 0 or done == len(entries):
            events.progress(f"speech of {split}", done, len(entries))


def _write_pictures(shards: Path, gathered: Gathered, events: Events) -> dict[str, list[Sample]]:
    from plait.data.card import SPLITS
    from plait.data.shards import write_shards

    written: dict[str, list[Sample]] = {}
    done = 0

    def entries(split: str) -> Iterable[Entry]:
        nonlocal done
        for picture in gathered.pictures:
            if picture.sample.meta["split"] == split:
                done += 1
                if done % 100 == 0 or done == len(gathered.pictures):
                    events.progress("shards", done, len(gathered.pictures))
                yield picture.sample, {picture.sample.media()[0].sha256: picture.read()}

    for split in SPLITS:
        if samples := write_shards(shards, split, entries(split)):
            written[split] = samples
    return written


def _sweep(folder: Path) -> None:
    """Remove what an attempt that was killed or failed left behind; finished shards are replaced as a whole later."""
    import shutil

    (folder / "ledger.jsonl").unlink(missing_ok=True)
    for rest in (*folder.glob(".shards.*.tmp"), *folder.glob(".shards.*.old")):
        shutil.rmtree(rest)
    for rest in folder.glob(".*.tmp"):
        rest.unlink()


def _summary(
    gathered: Gathered,
    ledger: Ledger,
    *,
    pictures: Mapping[str, Sequence[Sample]],
    questions: Mapping[str, Sequence[Sample]],
) -> dict[str, Any]:
    from collections import Counter

    from plait.data.instructions import TASKS

    tasks = {split: Counter(q.meta["task"] for q in asked) for split, asked in questions.items()}
    return {
        "splits": {split: len(samples) for split, samples in pictures.items()},
        "instruct": {split: {task: counts[task] for task in TASKS if counts[task]} for split, counts in tasks.items()},
        "ledger": ledger.totals(),
        "licences": {origin.name: origin.licence for origin in gathered.origins},
        "facts": dict(gathered.facts),
    }


def _sentence(summary: Mapping[str, Any]) -> str:
    splits = ", ".join(f"{count:,} {split}" for split, count in summary["splits"].items())
    asked = sum(sum(tasks.values()) for tasks in summary["instruct"].values())
    ledger = summary["ledger"]
    aloud = sum(counts["spoken"] for counts in summary.get("spoken", {}).values())
    said = f" ({aloud:,} of them spoken)" if "spoken" in summary else ""
    fates = ", ".join(f"{ledger[fate]:,} {fate}" for fate in ("kept", "changed", "dropped"))
    return f"pictures: {splits}; {asked:,} questions{said}; {ledger['rows']:,} source rows: {fates}"
