"""Markdown of our cards: what it becomes, and that nothing in it is markup."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.report.markdown import render
from plait.report.markup import duration, el, escape, number

pytestmark = pytest.mark.light

CARD = """# Card

Two **strong** words,
`code`.

## Splits
| split | n |
| --- | --- |
| a\\|b | 1,127 |

- one
  goes on
- two
#### Deep
```yaml
data: **not strong**

# no heading
```
"""


def test_blocks() -> None:
    html = render(CARD, level=3)
    for part in (
        "<h3>Card</h3><p>Two <strong>strong</strong> words, <code>code</code>.</p><h4>Splits</h4>",
        "<td>a|b</td><td>1,127</td>",
        "<ul><li>one goes on</li><li>two</li></ul><h5>Deep</h5>",
        "data: **not strong**\n\n# no heading</pre>",
    ):
        assert part in html, part


@given(st.text(alphabet=st.sampled_from("<>&\"'`*|#- \n[]()!\\ab\0")))
def test_no_text_becomes_markup(text: str) -> None:
    html = render(text, level=3)
    ours = r"</?(?:h[3-6]|p|ul|li|code|strong|pre|div|table|thead|tbody|tr|th|td)\b[^<>]*>"
    rest = re.sub(ours, "", html)
    assert not set("<>") & set(rest)
    assert re.fullmatch(r"(?:[^&]|&(?:amp|lt|gt|quot|#x27);)*", rest)


def test_attributes_and_children_are_escaped_once() -> None:
    assert el("a", escape("<"), "<", attrs={"title": '"<'}) == '<a title="&quot;&lt;">&lt;&lt;</a>'


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0, "0.0 s"), (59.96, "60.0 s"), (3599.7, "1 h 00 min"), (90061.0, "25 h 01 min")]
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_number() -> None:
    assert [number(v) for v in (None, 12345.6, 0.0, 2**60, float("inf"))] == [
        "–",
        "12,346",
        "0",
        "1,152,921,504,606,846,976",
        "inf",
    ]
