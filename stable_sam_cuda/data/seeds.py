"""Seeds that follow from names and numbers alone, on every machine."""

import hashlib


def seed_of(*parts: str | int | tuple[float, ...]) -> int:
    """A seed for `torch.Generator` that any other part, or another order, changes.

    It is hashed, because PyTorch's generator on the CPU looks at the last 32 bits of a seed alone.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
