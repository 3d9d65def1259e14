"""The emoji source: names from file names, splits without leaks, a fate for every file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import DataError, ResourceError
from plait.data.ledger import Ledger, Row
from plait.data.media import decode_image
from plait.data.sources import Gathered
from plait.data.sources.emoji import Drawn, EmojiChoice, gather_emoji, hold_out, merge, preview_emoji
from plait.data.sources.emoji_concepts import Entry, concept_of

pytestmark = pytest.mark.light

Home = Callable[[str], Path]
Reseal = Callable[[], None]
CHOICE = EmojiChoice(held_out=5, size=24, variants="one", flags=False, max_train=None, max_test=None, seed=0)


def gather(choice: EmojiChoice = CHOICE) -> tuple[Gathered, dict[str, Row]]:
    ledger = Ledger()
    gathered = gather_emoji(choice, ledger, lambda done, total: None)
    return gathered, {row.id: row for row in ledger.rows()}


def by_split(gathered: Gathered, name: str) -> dict[str, set[str]]:
    """Values of a meta field or an answer by split."""
    found: dict[str, set[str]] = {}
    for picture in gathered.pictures:
        value = picture.sample.meta.get(name) or picture.sample.answer(name)
        found.setdefault(picture.sample.meta["split"], set()).add(value or "")
    return found


@pytest.mark.usefixtures("reseal")
def test_every_file_has_a_fate_and_the_reasons_are_right() -> None:
    _, rows = gather()
    fates = {name: rows[name].reason for name in rows if rows[name].fate == "dropped"}
    assert fates["twemoji/1f469-200d-1f680.png"] == "variant"
    assert fates["openmoji/1F44B-1F3FB.svg"] == "variant"
    assert fates["twemoji/1f1eb-1f1f7.png"] == fates["openmoji/1F3F4-E0067-E0062-E0073-E0063-E0074-E007F.svg"] == "flag"
    assert fates["twemoji/1f3fd.png"] == "component"
    assert fates["openmoji/E0A1.svg"] == "not-emoji"
    assert rows["openmoji/2764-FE0F.svg"].fate != "dropped", "OpenMoji's selector must not hide the name"
    assert rows["openmoji/1F3F3-FE0F-200D-1F308.svg"].fate != "dropped", "the rainbow flag is no region"


@pytest.mark.usefixtures("reseal")
def test_samples_carry_names_in_both_languages_and_where_they_come_from() -> None:
    gathered, rows = gather()
    apple = next(p for p in gathered.pictures if p.row == "twemoji/1f34e.png")
    sample = apple.sample
    assert (sample.answer("name.en"), sample.answer("name.zh"), sample.answer("group")) == (
        "red apple",
        "红苹果",
        "food",
    )
    assert sample.meta["licence"] == "CC-BY-4.0"
    assert sample.meta["char"] == "🍎"
    assert sample.meta["concept"] == "1f34e"
    assert rows[apple.row].sample == sample.id
    (ref,) = sample.media()
    data = apple.read()
    assert (ref.sha256, ref.width, ref.height) == (hashlib.sha256(data).hexdigest(), 24, 24)
    assert sample.text("user") == ""
    assert len(sample.turns) == 1


@pytest.mark.row("S4-12")
@pytest.mark.usefixtures("reseal")
@pytest.mark.parametrize("variants", ["one", "all"])
def test_no_concept_name_or_picture_is_both_trained_and_held_out(variants: str) -> None:
    gathered, _ = gather(replace(CHOICE, variants=variants))
    for field in ("concept", "name.en", "name.zh"):
        splits = by_split(gathered, field)
        seen, held = splits["train"] | splits["test-style"], splits["test-concept"] | splits["test-both"]
        assert not seen & held
    pixels: dict[bool, set[bytes]] = {True: set(), False: set()}
    for picture in gathered.pictures:
        image = decode_image(picture.read(), place=picture.row)
        pixels[picture.sample.meta["split"] == "train"].add(image.tobytes())
    assert not pixels[True] & pixels[False]
    assert {
        p.sample.meta["style"] for p in gathered.pictures if p.sample.meta["split"] in ("train", "test-concept")
    } == {"twemoji"}


@pytest.mark.usefixtures("reseal")
def test_all_variants_stay_together() -> None:
    gathered, _ = gather(replace(CHOICE, variants="all"))
    where: dict[str, set[bool]] = {}
    for picture in gathered.pictures:
        held = picture.sample.meta["split"] in ("test-concept", "test-both")
        where.setdefault(concept_of(picture.sample.meta["char"]), set()).add(held)
    assert len(where["🧑‍🚀"]) == len(where["👋"]) == 1
    astronauts = [p for p in gathered.pictures if concept_of(p.sample.meta["char"]) == "🧑‍🚀"]
    assert len(astronauts) == 6, "three variants in two styles"


@pytest.mark.usefixtures("reseal")
def test_one_picture_a_concept_and_it_is_the_plain_one() -> None:
    gathered, _ = gather()
    trained = [p.sample for p in gathered.pictures if p.sample.meta["style"] == "twemoji"]
    assert len({s.meta["concept"] for s in trained}) == len(trained)
    assert {"🧑‍🚀", "👋"} <= {s.meta["char"] for s in trained}


def test_a_picture_equal_in_two_concepts_is_used_once_and_joins_them(emoji_home: Home, reseal: Reseal) -> None:
    folder = emoji_home("twemoji")
    (folder / "1f431.png").write_bytes((folder / "1f408.png").read_bytes())
    reseal()
    gathered, rows = gather()
    assert rows["twemoji/1f431.png"].reason == "duplicate"
    assert "1f408" in rows["twemoji/1f431.png"].detail
    assert gathered.facts["concepts"] == gather(replace(CHOICE, variants="all"))[0].facts["concepts"]
    for seed in range(3):
        both, _ = gather(replace(CHOICE, variants="all", seed=seed))
        held = {
            p.sample.meta["split"] in ("test-concept", "test-both")
            for p in both.pictures
            if p.sample.meta["char"] in ("🐈", "🐱")
        }
        assert len(held) == 1


def test_a_test_picture_equal_to_a_trained_one_is_dropped(emoji_home: Home, reseal: Reseal) -> None:
    """OpenMoji draws with resvg, so that equal pixels can only come from an equal drawing."""
    gathered, _ = gather(replace(CHOICE, held_out=1))
    style = [p for p in gathered.pictures if p.sample.meta["split"] == "test-style"]
    one, other = style[0], style[1]
    folder = emoji_home("openmoji")
    name = one.row.split("/")[1]
    (folder / name).write_bytes((folder / other.row.split("/")[1]).read_bytes())
    reseal()
    _, rows = gather(replace(CHOICE, held_out=1))
    assert sorted((rows[one.row].reason, rows[other.row].reason))[-1] == "duplicate"


@pytest.mark.parametrize("damage", [b"", b"not a picture", None])
def test_a_picture_published_damaged_is_dropped_with_its_fault(
    emoji_home: Home, reseal: Reseal, damage: bytes | None
) -> None:
    path = emoji_home("twemoji") / "1f34e.png"
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    (emoji_home("openmoji") / "1F34F.svg").write_text("<svg")
    (emoji_home("twemoji") / "not-hex.png").write_bytes(b"x")
    (emoji_home("twemoji") / "110000.png").write_bytes(b"x")
    reseal()
    _, rows = gather()
    assert rows["twemoji/1f34e.png"].reason == rows["openmoji/1F34F.svg"].reason == "unreadable"
    assert rows["openmoji/1F34E.svg"].reason == "not-in-train-style"
    assert rows["twemoji/not-hex.png"].reason == rows["twemoji/110000.png"].reason == "file-name"


@pytest.mark.usefixtures("reseal")
def test_limits_are_kept_counted_and_take_every_concept_before_a_second_picture() -> None:
    gathered, rows = gather(replace(CHOICE, variants="all", max_train=9, max_test=3))
    counts = {split: len(values) for split, values in by_split(gathered, "row").items()}
    assert counts == {"train": 9, "test-concept": 3, "test-style": 3, "test-both": 3}
    concepts = {split: len(values) for split, values in by_split(gathered, "concept").items()}
    assert concepts == counts
    reasons = [row.reason for row in rows.values()]
    assert reasons.count("over-max-train") > 0
    assert reasons.count("over-max-test") > 0
    pairs = by_split(gathered, "concept")
    assert pairs["test-concept"] == pairs["test-both"], "the same concepts in both styles, to compare"


@pytest.mark.usefixtures("reseal")
def test_the_same_seed_gives_the_same_and_another_seed_another_choice() -> None:
    first, again, other = (by_split(gather(replace(CHOICE, seed=seed))[0], "concept") for seed in (0, 0, 1))
    assert first == again
    assert first["test-concept"] != other["test-concept"]


@pytest.mark.usefixtures("reseal")
@pytest.mark.parametrize(
    "choice",
    [
        CHOICE,
        replace(CHOICE, variants="all", max_train=7, max_test=4),
        replace(CHOICE, flags=True),
        replace(CHOICE, validation=5, variants="all"),
    ],
)
def test_the_preview_says_what_will_be_gathered(choice: EmojiChoice) -> None:
    counts = {split: len(rows) for split, rows in by_split(gather(choice)[0], "row").items()}
    assert preview_emoji(choice) == counts


@pytest.mark.usefixtures("reseal")
def test_too_many_held_out_concepts_are_refused_with_the_number() -> None:
    with pytest.raises(DataError, match="200 concepts are to be held out, but there are only 21"):
        gather(replace(CHOICE, held_out=200))
    with pytest.raises(DataError, match=r"11 concepts .* \(5 to test, 6 to validate\), but there are only 21"):
        gather(replace(CHOICE, validation=6))


@pytest.mark.parametrize("damage", [None, b"overwritten"])
@pytest.mark.usefixtures("reseal")
@pytest.mark.parametrize(("style", "name"), [("twemoji", "1f34e.png"), ("openmoji", "1F34E.svg")])
def test_a_package_file_that_is_gone_or_changed_stops_the_source(
    emoji_home: Home, style: str, name: str, damage: bytes | None
) -> None:
    gather()
    path = emoji_home(style) / name
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(ResourceError, match=f"{name} is damaged") as refused:
        gather()
    assert refused.value.remedy == f"run `plait data fetch {style}`, which replaces it"


def test_a_package_that_is_not_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    with pytest.raises(ResourceError) as missing:
        gather()
    assert missing.value.remedy == "run `plait data fetch twemoji`"


@given(st.sets(st.text(min_size=1), min_size=4), st.integers(0, 3), st.text(min_size=1))
def test_adding_a_concept_moves_no_other_into_the_held_out_ones(concepts: set[str], seed: int, new: str) -> None:
    choice = replace(CHOICE, held_out=len(concepts) // 4, validation=len(concepts) // 2 - len(concepts) // 4, seed=seed)
    before, after = hold_out(concepts, choice), hold_out({*concepts, new}, choice)
    for use, number in (("test", choice.held_out), ("validation", choice.validation)):
        was, now = ({concept for concept in held if held[concept] == use} for held in (before, after))
        assert len(was) == len(now) == number
        assert now - was <= {new}
    assert {c for c, use in hold_out(concepts, replace(choice, validation=0)).items()} == {
        c for c, use in before.items() if use == "test"
    }


@pytest.mark.row("S4-63")
@pytest.mark.usefixtures("reseal")
@pytest.mark.parametrize("variants", ["one", "all"])
def test_validation_shares_no_concept_name_or_picture_with_any_other_split(variants: str) -> None:
    gathered, rows = gather(replace(CHOICE, validation=4, variants=variants))
    for field in ("concept", "name.en", "name.zh"):
        splits = by_split(gathered, field)
        held = splits.pop("validation")
        assert len(held) == 4 or field != "concept"
        assert not held & set().union(*splits.values())
    drawn = {
        split: {
            decode_image(p.read(), place=p.row).tobytes() for p in gathered.pictures if p.sample.meta["split"] == split
        }
        for split in by_split(gathered, "row")
    }
    held = drawn.pop("validation")
    assert not held & set().union(*drawn.values())
    assert {p.sample.meta["style"] for p in gathered.pictures if p.sample.meta["split"] == "validation"} == {"twemoji"}
    assert {row.source for row in rows.values() if row.reason == "validated"} == {"openmoji"}
    assert (
        by_split(gathered, "concept")["validation"]
        == by_split(gather(replace(CHOICE, validation=4))[0], "concept")["validation"]
    ), "the same concepts whatever the variants"


@pytest.mark.row("S4-63")
@pytest.mark.usefixtures("reseal")
def test_validation_leaves_the_tests_as_they_are() -> None:
    choice = replace(CHOICE, max_test=5)
    without, within = (by_split(gather(c)[0], "row") for c in (choice, replace(choice, validation=5)))
    held = within.pop("validation")
    assert {split: rows for split, rows in without.items() if split != "train"} == {
        split: rows for split, rows in within.items() if split != "train"
    }
    assert without["train"] == within["train"] | held
    some = replace(choice, max_train=9)
    without, within = (by_split(gather(c)[0], "row") for c in (some, replace(some, validation=5)))
    assert without == {split: rows for split, rows in within.items() if split != "validation"}, "nor training, if cut"


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=20))
def test_merging_is_the_closure_of_sharing_a_picture_or_a_name(rows: list[tuple[int, int, int]]) -> None:
    """Compared with a slow fixed point over all pairs."""
    entry = Entry(name_en="", name_zh="x", keywords="", group="", subgroup="", component=False)
    items = [
        Drawn(
            row=str(n),
            style="twemoji",
            path=Path(),
            char="",
            concept=f"c{concept}",
            entry=replace(entry, name_en=f"n{name}"),
            pixels=f"p{pixels}",
        )
        for n, (concept, name, pixels) in enumerate(rows)
    ]
    merged = [item.concept for item in merge(items)]
    group = list(range(len(rows)))
    changed = True
    while changed:
        changed = False
        for i, one in enumerate(rows):
            for j, other in enumerate(rows):
                if group[i] != group[j] and any(a == b for a, b in zip(one, other, strict=True)):
                    group = [min(group[i], group[j]) if g in (group[i], group[j]) else g for g in group]
                    changed = True
    for i in range(len(rows)):
        for j in range(len(rows)):
            assert (merged[i] == merged[j]) == (group[i] == group[j])
