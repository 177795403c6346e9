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
    parser.add_argument("--only", nargs="+", metavar="NAME", help="implementations to time (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the lines")
    parser.add_argument("--quick", action="store_true", help="small shapes and few repeats; writes no lines")
    given = parser.parse_args()

    from whimbrel.bench.runner import run_case

    options = {"device": given.device, "quick": given.quick, "against": given.against, "only": given.only}
    status = 0
    for name in given.cases or CASES:
        try:
            run_case(name, **options, out=None if given.quick else given.out)
        except WhimbrelError as error:  # the other cases still count
            print(f"error: {error}", file=sys.stderr)
            status = status or error.exit_status
    return status


if __name__ == "__main__":
    raise SystemExit(main())
