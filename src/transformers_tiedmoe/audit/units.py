"""How the audit writes figures for people: sizes, numbers, layers, names."""

from collections.abc import Sequence

from .schema import Interval


def size(num_bytes: float) -> str:
    """Write bytes in binary units with three digits, such as "14.2 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1000 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} B" if unit == "B" else f"{_digits(num_bytes)} {unit}"


def count(number: float) -> str:
    """Write a large number in words with three digits, such as "6.92 billion"; below a million in full."""
    for limit, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= limit:
            return f"{_digits(number / limit)} {unit}"
    return f"{number:,.0f}"


def flops(number: float) -> str:
    """Write floating-point operations, such as "2.56 GFLOPs"."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{_digits(number / limit)} {unit}FLOPs"
    return f"{number:.0f} FLOPs"


def rate(tokens_per_second: float) -> str:
    """Write tokens per second."""
    return f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second >= 100 else f"{tokens_per_second:.1f} tokens/s"


def figure(number: float | None) -> str:
    """Write a number of any size with three digits, such as "0.52" or "1,180"; a dash for none."""
    return "–" if number is None else f"{number:,.0f}" if abs(number) >= 99.95 else f"{number:.3g}"


def added(nats: float) -> str:
    """Write a difference of losses, such as "+0.010 nats"."""
    return f"{nats:+.3f} nats"


def percent(part: float) -> str:
    """Write a part of one, such as "18 %"; with a decimal below 10 %."""
    if 0 < part < 0.0005:
        return "<0.1 %"
    return f"{100 * part:.0f} %" if part >= 0.0995 or part == 0 else f"{100 * part:.1f} %"


def interval(figure: Interval | None, digits: int = 2) -> str:
    """Write a figure with its interval, such as "0.31 (0.29–0.33)"; a dash for none."""
    if figure is None:
        return "–"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.{digits}f}"
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f}–{figure.high:.{digits}f})"


def span(layers: Sequence[int]) -> str:
    """Write layer indices: "4–7", or "0, 1 and 14"."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return join([str(layer) for layer in layers])


def runs(layers: Sequence[int]) -> str:
    """Write ascending layer indices with neighbours together: "0, 4–7 and 11"."""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return join([span(each) if len(each) > 1 else str(each[0]) for each in found])


def join(words: Sequence[str]) -> str:
    """Write an enumeration: "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def one_line(text: object) -> str:
    """Return text that others chose as one line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def short(name: object, most: int = 32) -> str:
    """Return a name as one line of at most `most` characters, its middle left out."""
    line = one_line(name)
    return line if len(line) <= most else f"{line[: most - most // 3 - 1]}…{line[len(line) - most // 3 :]}"


def _digits(number: float) -> str:
    return f"{number:.2f}" if abs(number) < 9.995 else f"{number:.1f}" if abs(number) < 99.95 else f"{number:,.0f}"
