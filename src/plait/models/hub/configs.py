"""Reading a published ``config.json``: settings that are carried over, and those that must be as we have them."""

from collections.abc import Mapping, Sequence
from typing import Any

from plait.core.errors import CheckpointError


def require(config: Mapping[str, Any], wanted: Mapping[str, Any], *, place: str) -> None:
    """Refuse settings that the tower does not have.

    Args:
        config: Of the layout.
        wanted: The only value of each setting that our form computes; also what a missing setting means.
        place: Name of the layout, for the error.

    Raises:
        CheckpointError: Names every setting that differs, what was expected and what came.
    """
    wrong = [
        f"{key} must be {value!r}, came {config[key]!r}"
        for key, value in wanted.items()
        if config.get(key, value) != value
    ]
    if wrong:
        raise CheckpointError(
            "; ".join(wrong),
            place=f"config of {place}",
            remedy="use weights of the standard form, or load the model through transformers instead",
        )


def one_of(config: Mapping[str, Any], key: str, allowed: Sequence[Any], *, place: str) -> Any:
    """A setting that may have one of some values; the first one is what a missing setting means.

    Raises:
        CheckpointError: It has another value; says which there are.
    """
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise CheckpointError(
            f"{key} must be one of {', '.join(map(repr, allowed))}, came {value!r}",
            place=f"config of {place}",
            remedy="use weights of the standard form, or load the model through transformers instead",
        )
    return value


def square(config: Mapping[str, Any], key: str, default: int, *, place: str) -> int:
    """A setting in pixels a side, which may be written as two equal numbers.

    Raises:
        CheckpointError: The two differ.
    """
    value = config.get(key, default)
    rows, columns = (value, value) if isinstance(value, int) else value
    if rows != columns:
        raise CheckpointError(
            f"{key} must be square, came {rows} x {columns}",
            place=f"config of {place}",
            remedy="load the model through transformers instead",
        )
    return rows


def labels(config: Mapping[str, Any]) -> int:
    """Classes of the classifier: 0 unless the config is of a model with one.

    ``id2label`` counts them; transformers does not write it where there are two.
    """
    if not any("ForImageClassification" in name for name in config.get("architectures") or ()):
        return 0
    return len(config["id2label"]) if config.get("id2label") else int(config.get("num_labels", 2))


def labeled(name: str, num_classes: int) -> dict[str, Any]:
    """The part of a config that says which class of transformers has this form: bare model, or with a classifier.

    Args:
        name: Of the family, such as ``Swin``.
        num_classes: Of the classifier; 0: none.
    """
    if not num_classes:
        return {"architectures": [f"{name}Model"]}
    names = {str(i): f"LABEL_{i}" for i in range(num_classes)}
    return {
        "architectures": [f"{name}ForImageClassification"],
        "id2label": names,
        "label2id": {label: int(i) for i, label in names.items()},
    }
