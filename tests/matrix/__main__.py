"""Walk the whole product and write ``docs/matrix.json``: what ``make matrix`` runs."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.conftest import write_decoder
from tests.matrix.cases import folder_of, product, settings
from tests.matrix.walk import walk
from tests.tiny_towers import TinyTowers

RECORD = Path(__file__).parents[2] / "docs" / "matrix.json"


def main() -> int:
    """Walk; 1 if a case does not hold."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        towers, decoder = TinyTowers(root / "towers"), root / "decoder"
        decoder.mkdir()
        write_decoder(decoder)
        everything = product()
        for number, case in enumerate(everything):
            name = folder_of(case.encoder)
            tower = towers.folder(name) if name else None
            start = time.perf_counter()
            try:
                found = {"holds": True} | walk(settings(case, tower=tower, decoder=decoder), root / f"{number}")
            except Exception as error:
                found = {"holds": False, "error": f"{type(error).__name__}: {error}"}
            rows.append({"case": list(case), **found, "seconds": round(time.perf_counter() - start, 2)})
            if not found["holds"] or number % 50 == 0:
                print(f"{number + 1} of {len(everything)}: {case}: {found.get('error', 'holds')}", flush=True)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    head = {"date": time.strftime("%Y-%m-%d"), "versions": versions, "holds": sum(row["holds"] for row in rows)}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    RECORD.write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{head['holds']} of {len(rows)} compositions hold: {RECORD}")
    return 0 if head["holds"] == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
