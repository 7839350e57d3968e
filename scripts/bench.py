"""Benchmarks: `python scripts/bench.py NAME`, NAME one of the modules of `scripts/benches/`. Ratios, taken in one run."""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    sys.path.insert(0, str(HERE))
    names = sorted(path.stem for path in (HERE / "benches").glob("*.py") if path.stem != "__init__")
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print(f"error: benchmark {sys.argv[1] if len(sys.argv) > 1 else '(none)'!r} is not one of: {', '.join(names)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"benches.{sys.argv[1]}").main(sys.argv[2:]) or 0


if __name__ == "__main__":
    sys.exit(main())
