"""Numbers as people read them."""

from __future__ import annotations


def plain(value: float) -> str:
    """Returns 1240 as ``1,240``, 0.00293 as ``0.00293``, 15000000.0 as ``15 M``."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
    return count(value) if abs(value) >= 1e6 else f"{value:.2g}"


def percent(fraction: float) -> str:
    """Returns 0.955 as ``95.5%``."""
    value = 100 * fraction
    return f"{value:.1f}%" if abs(value) < 99.95 and round(value, 1) != round(value) else f"{value:.0f}%"


def scaled(value: float, unit: str) -> str:
    """Returns 1234567 of ``B`` as ``1.23 MB``: three digits and a power of 1000."""
    digits, exponent = f"{value:.2e}".split("e")
    power = min(max(int(exponent) // 3, 0), 5)
    return f"{float(digits) * 10.0 ** (int(exponent) - 3 * power):,.4g} {' kMGTP'[power].strip()}{unit}".strip()


def count(value: float) -> str:
    """Returns 1234567 as ``1.23 M``."""
    return scaled(value, "")


def size(num_bytes: float) -> str:
    """Returns 1234567 bytes as ``1.23 MB``."""
    return scaled(num_bytes, "B")


def duration(seconds: float) -> str:
    """Returns 90.2 as ``1 min 30 s``, 7500 as ``2 h 5 min``, 0.0123 as ``12.3 ms``."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    for small, large, factor, name, smaller in ((1, 60, 3600, "min", "s"), (60, 3600, 86400, "h", "min")):
        if round(seconds / small) * small < factor:
            whole, rest = divmod(round(seconds / small), large // small)
            return f"{whole} {name}" + (f" {rest} {smaller}" if rest else "")
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d" + (f" {hours} h" if hours else "")
