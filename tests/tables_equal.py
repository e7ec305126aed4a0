"""The one comparison of two runs' tables that every resume and fault test uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from rayinterp.tables import KEYS, VOLATILE, Tables


def assert_tables_equal(left: Tables, right: Tables, names: Iterable[str], tolerance: float = 1e-5) -> None:
    """Same keys, each once, and the same values in every column that is not volatile; row order plays no part."""
    for name in names:
        a, b = (_by_key(tables.read(name), name) for tables in (left, right))
        assert a.keys() == b.keys(), f"{name}: keys differ: {sorted(a.keys() ^ b.keys())[:5]}"
        for key, row in a.items():
            for column, value in row.items():
                if column not in VOLATILE.get(name, []):
                    assert _same(value, b[key][column], tolerance), (
                        f"{name} {key} {column}: {value} != {b[key][column]}"
                    )


def _by_key(table: pa.Table, name: str) -> dict[tuple, dict[str, Any]]:
    rows = {tuple(str(row[column]) for column in KEYS[name]): row for row in table.to_pylist()}
    assert len(rows) == table.num_rows, f"{name}: {table.num_rows - len(rows)} keys stand twice"
    return rows


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if a is None or b is None or isinstance(a, str | bool | int):
        return a == b
    if isinstance(a, list) and a and isinstance(a[0], str | int):
        return a == b
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return a.shape == b.shape and bool(np.allclose(a, b, atol=tolerance, rtol=tolerance, equal_nan=True))
