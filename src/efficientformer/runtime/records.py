"""Results as plain values: what a JSON line, a row of CSV or of Parquet says of one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from efficientformer.spec.text import storable

if TYPE_CHECKING:
    from efficientformer.runtime.classifier import Prediction

Record: TypeAlias = dict[str, Any]
"""``path``, ``pred_label``, ``pred_score``, ``pred_class`` and ``top_k`` (a list of ``label``, ``score``, ``class``);
or ``path`` and ``error``."""


def record(path: str, prediction: Prediction | None, error: str, top_k: int) -> Record:
    """Return what became of one picture.

    Args:
        path: Its name.
        prediction: The prediction; None if it was skipped.
        error: Why it was skipped.
        top_k: Classes to keep.
    """
    if prediction is None:
        return {"path": path, "error": error}
    best = prediction.top_k(top_k)
    return {
        "path": path,
        "pred_label": prediction.label,
        "pred_score": round(prediction.score, 6),
        "pred_class": storable(prediction.name),
        "top_k": [{"label": i, "score": round(score, 6), "class": storable(name)} for i, score, name in best],
    }


def arrow_row(record: Record) -> Record:
    """Return a record, or another flat row, in UTF-8: Arrow takes no other text, nor do readers of JSON and CSV."""
    return {name: storable(value) if isinstance(value, str) else value for name, value in record.items()}


def arrow_schema() -> Any:  # noqa: ANN401 (a pyarrow.Schema; pyarrow has no types)
    """Return the columns of records in Arrow and Parquet; ``error`` is null for classified pictures."""
    import pyarrow as arrow

    label, score, name = arrow.int32(), arrow.float32(), arrow.string()
    top = arrow.list_(arrow.struct({"label": label, "score": score, "class": name}))
    return arrow.schema(
        {"path": name, "pred_label": label, "pred_score": score, "pred_class": name, "top_k": top, "error": name}
    )
