"""How numbers are written by people and for them, in recipes, in the terminal and on pages."""

from __future__ import annotations

import re

from headstart.system.errors import UserError

NOTHING = "–"
"""Stands where there is no number."""


def count_text(count: float) -> str:
    """A count in the unit a reader would say.

    >>> count_text(12_345_678), count_text(999), count_text(1_300_000_000)
    ('12.3M', '999', '1.30B')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            value = count / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"
    return f"{count:.0f}"


def flops_text(flops: float) -> str:
    """Floating point operations with three digits.

    >>> flops_text(1.234e15), flops_text(0)
    ('1.23e15', '0')
    """
    if not flops:
        return "0"
    mantissa, exponent = f"{flops:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def tick_of_count(count: float) -> str:
    """A round count on an axis.

    >>> [tick_of_count(count) for count in (0, 500, 20_000, 1_500_000, 2_000_000_000)]
    ['0', '500', '20k', '1.5M', '2B']
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.6g}{unit}"
    return f"{count:.6g}"


def tick_of_power(value: float) -> str:
    """A round number on an axis, with its power of ten written out.

    >>> [tick_of_power(value) for value in (0, 1e12, 2.5e9)]
    ['0', '10¹²', '2.5×10⁹']
    """
    if not value:
        return "0"
    mantissa, exponent = f"{value:.3e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if float(mantissa) == 1 else f"{float(mantissa):g}×{power}"


def bytes_text(amount: float) -> str:
    """Bytes in the unit of at most three digits before the point.

    >>> bytes_text(1_234_567), bytes_text(0)
    ('1.2 MB', '–')
    """
    if not amount:
        return NOTHING
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:,.1f} {units[0]}"


def duration_text(seconds: float) -> str:
    """Seconds in the two largest units.

    >>> duration_text(8.25), duration_text(200), duration_text(3900)
    ('8.2s', '3m20s', '1h05m')
    """
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


COUNT_PATTERN = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?)([KMGBT]?)", re.IGNORECASE)


def parse_count(text: int | str) -> int:
    """Read an amount with an optional K, M, B or G (both 1e9), or T.

    >>> parse_count("1.5M")
    1500000
    """
    found = COUNT_PATTERN.fullmatch(str(text))
    if not found:
        raise UserError(f"{text!r} is not a count; write a number, or one with K, M, B, G or T")
    scale = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}[found[2].upper()]
    return round(float(found[1]) * scale)


SIZES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def parse_bytes(text: str, name: str) -> float:
    """Read an amount of memory with its unit, which is a power of 1000.

    >>> parse_bytes("80GB", "--gpu-memory"), parse_bytes("1.5 tb", "--gpu-memory")
    (80000000000.0, 1500000000000.0)

    Raises:
        UserError: it is none; the sentence begins with `name`.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.strip().upper())
    if not found or not float(found[1]):
        raise UserError(f"{name} is {text!r}; write a size above 0 with its unit, such as 80GB")
    return float(found[1]) * SIZES[found[2]]
