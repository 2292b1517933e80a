"""Arithmetic that every folder needs."""


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def is_power_of_2(n: int) -> bool:
    """Return whether n is 1, 2, 4, 8 ..."""
    return n > 0 and n & (n - 1) == 0
