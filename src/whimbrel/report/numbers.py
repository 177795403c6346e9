"""How numbers are written for readers: units, digits, a true minus sign."""

from __future__ import annotations

import math

_MINUS = "\u2212"
_SPACE = "\u00a0"  # keeps a number and its unit on one line


def fixed(value: float, digits: int) -> str:
    """`value` with that many decimals."""
    text = f"{value:,.{digits}f}"
    return text.replace("-", _MINUS) if float(text.replace(",", "")) != 0 else text.lstrip("-")


def signed(value: float, digits: int) -> str:
    """As `fixed`, with a plus sign above zero."""
    text = fixed(value, digits)
    return f"+{text}" if value > 0 and float(text.replace(",", "")) != 0 else text


def significant(value: float, digits: int = 3) -> str:
    """`value` with that many significant digits; powers of ten only for the very small and the very large."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 < exponent < 7:
        text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", _MINUS)
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}".replace("-", _MINUS)


def count(value: float) -> str:
    """A number of things: exact below ten thousand, then in thousands, millions, billions."""
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{value / size:.2f}{_SPACE}{unit}"
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """As on an axis: 512, 4k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def power_count(value: float) -> str:
    """Lengths on an axis: powers of two from 1024 on in units of 1024, others as `short_count`."""
    return f"{int(value) // 1024}K" if value >= 1024 and value % 1024 == 0 else short_count(value)


def size(value: float) -> str:
    """Bytes in binary units, three digits."""
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= scale:
            scaled = value / scale
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f}{_SPACE}{unit}"
    return f"{value:.0f}{_SPACE}B"


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 in per cent."""
    return f"{fixed(100 * share, digits)}%"


def seconds(value: float) -> str:
    """A length of time."""
    if value < 1:
        return f"{1e3 * value:.3g}{_SPACE}ms"
    if value < 10:
        return f"{value:.2f}{_SPACE}s"
    whole = round(value)
    if whole < 60:
        return f"{whole}{_SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{_SPACE}min {whole % 60}{_SPACE}s"
    return f"{whole // 3600}{_SPACE}h {whole % 3600 // 60}{_SPACE}min"


def listed(names: list[str]) -> str:
    """Names as a sentence would give them: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
