"""`make bench [NAME=...]`: ratios against plain implementations, in one run; a table, and `build/bench.json`.

A benchmark is a module beside this one with `NAME` and `run() -> list[Row]`. A missed target stays in the table.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import benchmarks


def main() -> None:
    wanted = sys.argv[1:]
    modules = [
        importlib.import_module(f"{benchmarks.__name__}.{m.name}")
        for m in pkgutil.iter_modules(benchmarks.__path__)
        if not m.name.startswith("_") and m.name != "measure"
    ]
    known = {module.NAME: module for module in modules}
    unknown = set(wanted) - set(known)
    if unknown:
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(sorted(known))}")
    rows = [row for name, module in known.items() if not wanted or name in wanted for row in module.run()]
    table = Table("name", "ours", "baseline", "ratio", "unit", "target", "met")
    for row in rows:
        table.add_row(
            *("-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value) for value in row)
        )
    Console(width=max(Console().width, 150)).print(table)
    path = Path("build/bench.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([row._asdict() for row in rows], indent=2))


if __name__ == "__main__":
    main()
