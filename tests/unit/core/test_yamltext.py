"""YAML in and out: safe, with places, and back unchanged."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.errors import ConfigError
from plait.core.yamltext import SIZE_LIMIT, leaves, merge, put, read_file, read_override, read_text, write_text

pytestmark = pytest.mark.light

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
KEYS = st.text(max_size=8)
PLAIN = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3), max_leaves=6
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("no", "no"),  # YAML 1.1 makes this False: the Norway problem
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("~", None),
        ("NULL", None),
        ("010", 10),  # YAML 1.1 makes this 8
        ("0o17", 15),
        ("0xff", 255),
        ("-3", -3),
        ("1:30", "1:30"),  # YAML 1.1 makes this 90
        ("1_000", "1_000"),
        ("1e-4", 1e-4),  # YAML 1.1 makes this text
        ("1e6", 1_000_000),
        ("2.5E3", 2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("2024-01-02", "2024-01-02"),  # YAML 1.1 makes this a date
        ("=", "="),
        ("1.2.3", "1.2.3"),
        ("'12'", "12"),
        ('"a\\nb"', "a\nb"),
    ],
)
def test_words_mean_what_yaml_1_2_says(text: str, meaning: Any) -> None:
    for value in (read_text(f"key: {text}", "f").plain()["key"], read_override(f"key={text}")[1].plain()):
        assert (value, type(value)) == (meaning, type(meaning))


def test_not_a_number_is_read() -> None:
    assert math.isnan(read_text("key: .nan", "f").plain()["key"])


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_what_is_written_is_read_back(plain: dict[str, Any]) -> None:
    text = write_text(plain)
    assert repr(read_text(text, "f").plain()) == repr(plain)


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_comments_change_nothing_and_stand_beside_their_value(plain: dict[str, Any]) -> None:
    comments = {keys: f"note {number}" for number, (keys, _) in enumerate(leaves(plain))}
    text = write_text(plain, comments)
    assert repr(read_text(text, "f").plain()) == repr(plain)
    lines = text.split("\n")
    tree = read_text(text, "f")
    for keys, note in comments.items():
        assert lines[tree.nearest(keys)[0].source.line - 1].endswith(f"  # {note}")


@given(
    st.dictionaries(st.text(string.ascii_letters, min_size=1), st.sampled_from(["no", "on", "1:30", "1e3", "010", "~"]))
)
def test_other_yaml_readers_see_text_where_we_wrote_text(plain: dict[str, str]) -> None:
    assert yaml.safe_load(write_text(plain)) == plain


def test_every_value_knows_its_line() -> None:
    tree = read_text("a: 1\nb:\n  c: [1,\n    2]\n  d:\n    - x: 1\n    - x: 2\n", "f.yaml")
    found = {".".join(keys): tree.nearest(keys)[0].source.where for keys, _ in leaves(tree.plain())}
    assert found == {"a": "f.yaml:1", "b.c": "f.yaml:3", "b.d.0.x": "f.yaml:6", "b.d.1.x": "f.yaml:7"}


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is given twice (first on line 1)"),
        ("a:\n  b: 1\n  b: 2\n", 3, "'b' is given twice"),
        ("a: 1\nb: !!python/object:os.system {}\n", 2, "tag 'tag:yaml.org,2002:python/object:os.system' is refused"),
        ("a: 1\nb: ! x\n", 2, "tag '!' is refused"),
        ("a: &x 1\n", 1, "anchors and aliases"),
        ("a: 1\nb: *x\n", 2, "anchors and aliases"),
        ("a: 1\n<<: {b: 1}\n? [c]\n: 2\n", 3, "a key must be a word"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("a: 1\nb: 'x\n", 3, "not valid YAML"),
        ("a: 1\nb: \x07\n", 2, "character U+0007"),
        ('a: "\\UFFFFFFFF"\n', 1, "not valid YAML"),
        ('a: 1\nb: "\\ud83d\\ude00"\n', 2, "surrogate"),
        ("- a\n- b\n", 1, "expected a mapping of settings, came a list (a, b)"),
        ("just text", 1, "expected a mapping of settings, came text 'just text'"),
        ("a: " + "[" * 60 + "]" * 60, 1, "nested deeper than 50"),
        ("a: " + "[" * 1_000_000, 1, "nested deeper than 50"),
    ],
)
def test_beyond_the_subset_is_refused_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(text, "f.yaml")
    assert says in caught.value.cause
    assert caught.value.place == f"f.yaml:{line}"
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n"])
def test_an_empty_file_is_said_to_be_empty(text: str) -> None:
    with pytest.raises(ConfigError, match="empty"):
        read_text(text, "f.yaml")


@pytest.mark.parametrize(
    ("data", "says", "place"),
    [
        (b"a: 1\nb: \xff\n", "not UTF-8: byte 0xff at offset 8", ":2"),
        (b"a: " + b"x" * SIZE_LIMIT, "larger than 1,000,000 bytes", ""),
    ],
)
def test_bytes_that_are_no_recipe(tmp_path: Path, data: bytes, says: str, place: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    assert caught.value.cause == says
    assert caught.value.place == f"{path}{place}"


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_file(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_file(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("a: 1\r\nb: 小\r\n".encode("utf-8-sig"))
    assert read_file(path).plain() == {"a": 1, "b": "小"}


@given(st.text() | st.text(":[]{}-#&*!|>'\"%@`,? \n\tab1", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    refusals: list[ConfigError] = []
    for read in (lambda: read_text(text, "f"), lambda: read_override(text), lambda: read_override(f"a={text}")):
        try:
            read()
        except ConfigError as error:
            refusals.append(error)
    assert all(error.place for error in refusals)


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("a.b=./x: y # z", ("a", "b"), "./x: y # z"),
        ("a=b=c", ("a",), "b=c"),
        ("a=[1, x, null]", ("a",), [1, "x", None]),
        ("a={b: {c: 1e-3}}", ("a",), {"b": {"c": 1e-3}}),
        ("a= 'x y' ", ("a",), "x y"),
        ("a=''", ("a",), ""),
        ("a=*.csv", ("a",), "*.csv"),
        ("a=- 1", ("a",), "- 1"),
    ],
)
def test_overrides(text: str, keys: tuple[str, ...], value: Any) -> None:
    found, node = read_override(text)
    assert (found, node.plain()) == (keys, value)
    assert node.source.where == f"override {text!r}"


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=3", ".a=3", "a=", "a=[1", "a={b: 1, b: 2}", "a='x' y", "a=[*b]"])
def test_bad_overrides_are_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_override(text)
    assert caught.value.place == f"override {text!r}"
    assert caught.value.remedy


def test_merge_joins_mappings_and_replaces_the_rest() -> None:
    base = read_text("a: {x: 1, y: 2}\nb: [1, 2]\nc: 1\n", "base")
    over = read_text("a: {y: 3, z: 4}\nb: [9]\nd: 1\nc: null\n", "over")
    merged = merge(base, over)
    assert merged.plain() == {"a": {"x": 1, "y": 3, "z": 4}, "b": [9], "c": None, "d": 1}
    assert list(merged.plain()) == ["a", "b", "c", "d"]
    assert [merged.nearest([key])[0].removes for key in "cd"] == [True, False]
    assert [str(merged.nearest(keys)[0].source) for keys in (("a", "x"), ("a", "y"))] == ["base:1", "over:1"]


@settings(max_examples=40, deadline=None)
@given(PLAIN, PLAIN)
def test_merging_with_itself_or_nothing_changes_nothing(one: dict[str, Any], other: dict[str, Any]) -> None:
    base = read_text(write_text(one), "one")
    over = read_text(write_text(other), "other")
    assert merge(base, base).plain() == one
    assert merge(merge(base, over), over).plain() == merge(base, over).plain()


def test_put_reaches_into_lists_and_makes_missing_mappings() -> None:
    tree = read_text("a: [{b: 1}, {b: 2}]\n", "f")
    for text in ("a.1.b=5", "c.d.e=6", "a.0.x=7"):
        tree = put(tree, *read_override(text))
    assert tree.plain() == {"a": [{"b": 1, "x": 7}, {"b": 5}], "c": {"d": {"e": 6}}}
    for text in ("a.2.b=1", "a.-1=1", "a.b=1"):
        with pytest.raises(ConfigError, match="the list has 2"):
            put(tree, *read_override(text))


def test_put_does_not_lose_a_single_value_on_its_way() -> None:
    tree = read_text("data: {source: ./pairs.csv, rest: null}\n", "f")
    with pytest.raises(ConfigError, match=r"inside the single value text './pairs.csv' \(from f:1\)"):
        put(tree, *read_override("data.source.limit=5"))
    assert put(tree, *read_override("data.rest.limit=5")).plain()["data"]["rest"] == {"limit": 5}
    assert put(tree, *read_override("data.source={limit: 5}")).plain()["data"]["source"] == {"limit": 5}
