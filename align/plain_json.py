"""Values as JSON that every reader takes: what is no number there (NaN, infinity) is null."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """`value` as JSON text by json.dumps's own `options`, null in the place of NaN and infinity."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def as_json(value: Any) -> Any:
    """`value` as a file would give it back: what JSON has no word for, such as a date of Parquet's, as text."""
    return json.loads(dumps(value, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
