"""Checks of constructor sizes, shared by the modules."""


def require_integer(name: str, value: int, minimum: int) -> int:
    """``value`` where it is an integer of at least ``minimum``; TypeError or ValueError naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return value
