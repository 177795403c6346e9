"""What the ids of generated tasks are written as: ordinary words for any model, reserved tokens for Whimbrel's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from whimbrel.data.tokenizer import KEY_TOKENS, VALUE_TOKENS, Symbols

# Short nouns, most of which are one token behind a space in the usual vocabularies: 64 keys, then 64 values.
_NOUNS = """
apple bear bird boat book bread bridge brush cake camp candle car card castle cat chair cheese church clock cloud coat
coffee corn cow crown cup desk dog door dress duck engine eye farm field fire fish flag flower foot forest fox frame
garden gate glass glove gold grass guitar gun hair hall hammer hand hat heart hill horse house ice island jacket judge
juice key king kitchen knife lake lamp leaf leg letter lion lock map market meat metal milk mirror moon mountain mouse
mouth museum nail needle nest nose ocean office oil orange oven page paint paper park pen piano pilot pipe plane plant
plate pool potato prince queen rain ring river road rock roof rope rose salt school ship shoe silver table tail tea
tent
"""
_FILLERS = """
and but for from into just like more most much not now of off on only or out over some such than that the then
"""


class Script(NamedTuple):
    """Words in the order of their ids: keys, values, fillers."""

    words: tuple[str, ...]
    space: str
    """What stands between two words."""

    def write(self, ids: Sequence[int]) -> str:
        """The text of ids of `SYMBOLS`."""
        return self.space.join(self.words[i] for i in ids)


def _ids(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count)


def symbols_of(script: Script) -> Symbols:
    """The ids that tasks are generated in, for `script`."""
    count = len(KEY_TOKENS)
    return Symbols(_ids(0, count), _ids(count, count), _ids(2 * count, len(script.words) - 2 * count))


SCRIPTS = {
    "english": Script((*_NOUNS.split(), *_FILLERS.split()), " "),
    # Whimbrel's tokenizers take digits one by one, so a word is a token here.
    "reserved": Script((*KEY_TOKENS, *VALUE_TOKENS, *"0123456789"), ""),
}
"""Name -> script."""
