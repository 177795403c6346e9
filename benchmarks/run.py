"""Time cases and append their lines to `benchmarks/results/`: `python benchmarks/run.py rdn optim`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from whimbrel.bench import CASES
from whimbrel.errors import WhimbrelError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one or more of {', '.join(CASES)} (default: all)")
    parser.add_argument("--against", nargs="+", metavar="NAME", help="implementations to take ratios against")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes and few repeats; writes no lines")
    given = parser.parse_args()

    from whimbrel.bench.runner import run_case

    results = None if given.quick else Path(__file__).parent / "results"
    try:
        for name in given.cases or CASES:
            run_case(name, device=given.device, quick=given.quick, against=given.against, out=results)
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
