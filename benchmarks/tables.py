"""Write the result tables of the pages of methods: python benchmarks/tables.py

Run it after benchmarks/plots.py: the page shows the figures that lie beside it. What stands in each page is made in
`method_pages`.
"""

from __future__ import annotations

from method_pages import averaging, mixers, optimizers, prefill, smollm2
from method_pages.markdown import insert

from whimbrel.files import atomic_write_text


def main() -> None:
    for page, name, text in (
        (mixers.PAGE, "results", mixers.method_tables()),
        *((optimizers.PAGE, name, text) for name, text in optimizers.parts().items()),
        (prefill.PAGE, "results", prefill.prefill_page()),
        (prefill.PAGE, "smollm2", smollm2.smollm2_part()),
        (averaging.PAGE, "results", averaging.averaging_page()),
    ):
        atomic_write_text(page, insert(page.read_text(encoding="utf-8"), text, name))


if __name__ == "__main__":
    main()
