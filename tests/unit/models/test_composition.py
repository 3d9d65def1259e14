"""Settings of compositions: what does not fit together is refused where it is written."""

import pytest
from pydantic import ValidationError

from plait.models.composition import Composition, NewDecoder
from plait.models.specs import QFormer

pytestmark = pytest.mark.light


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_head_of_an_odd_width_cannot_be_turned(family: str) -> None:
    with pytest.raises(ValidationError, match=f"6 heads of a width of 66 have 11 each: {family}"):
        NewDecoder.model_validate({"model_type": family, "d": 66, "heads": 6})
    assert NewDecoder(model_type="gpt2", d=66, heads=6).d == 66  # its positions are added


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"d": 64, "heads": 5}, "5 heads do not divide a width of 64"),
        ({"d": 64, "heads": 4, "kv_heads": 3}, "3 heads of keys and values do not divide 4 heads"),
        ({"model_type": "gpt2", "d": 64, "heads": 4, "kv_heads": 2}, "gpt2 has as many"),
    ],
)
def test_heads_that_do_not_fit_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        NewDecoder.model_validate(given)


def test_heads_of_a_qformer_divide_its_width() -> None:
    with pytest.raises(ValidationError, match="5 heads do not divide a width of 192"):
        QFormer(d=192, heads=5)


def test_every_encoder_has_a_connector() -> None:
    with pytest.raises(ValidationError, match="encoders for nothing and connectors for image"):
        Composition.model_validate({"encoders": {}, "connectors": {"image": {"kind": "mlp"}}})
