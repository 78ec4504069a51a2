"""Keyed randomness: numbers that depend on their key alone, never on what was drawn before.

NumPy's generators may change their streams between versions; splitmix64 (Steele, Lea and Flood,
OOPSLA 2014) is written out here so that an order or a crop stays the same for ever.
"""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """The splitmix64 output for the state `value`, a bijection of 64-bit integers."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK
    return value ^ (value >> 31)


def combine(*parts: int) -> int:
    """One 64-bit key from several integers; their order matters."""
    key = 0
    for part in parts:
        key = splitmix64(key ^ (part & _MASK))
    return key


def splitmix64_array(value: np.ndarray) -> np.ndarray:
    """splitmix64 of every number, uint64 [n] to uint64 [n]."""
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX2)
    return value ^ (value >> np.uint64(31))


def permutation(n: int, key: int) -> np.ndarray:
    """A permutation of range(n), int64 [n]: the order of splitmix64(i ^ key).

    These are all different, as splitmix64 is a bijection; so every way to sort gives the same.
    """
    return np.argsort(splitmix64_array(np.arange(n, dtype=np.uint64) ^ np.uint64(key)))


class KeyedRandom:
    """A short stream of uniform floats for one key, such as (seed, sample index)."""

    def __init__(self, *key: int):
        self._state = combine(*key)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """The next number in [low, high), with 53 random bits."""
        value = splitmix64(self._state)
        self._state = (self._state + _GOLDEN) & _MASK
        return low + (high - low) * ((value >> 11) * 2.0**-53)
