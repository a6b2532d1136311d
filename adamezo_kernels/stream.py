"""Random directions: each is a place in a Philox stream, never a stored tensor."""

from __future__ import annotations

from typing import NamedTuple

STREAM_VERSION = 1
"""Version of the mapping from (seed, direction, parameter, element) to bits. A change of one
bit of any direction must change this number: saved runs name it."""

DISTRIBUTIONS = ("exact", "fast", "rademacher", "lowrank", "flipout")
"""The distributions of directions, each a stream of its own: a run uses one for all its steps.

``exact``: standard normals with the same bits on every device. ``fast``: nearly the same normals
in fewer instructions, on CUDA devices only, with bits that are a device's own. ``rademacher``:
signs, +1 or -1, with the same bits on every device. ``lowrank``: of a parameter seen as a matrix,
the outer product of one normal vector for its rows and one for its columns; ``"lowrank:4"`` is a
sum of four of them, divided by 2. ``flipout``: of ``"flipout:8"`` eight consecutive directions have
exact normals in common, those of directions 8 k to 8 k + 7, and each has signs of its own for the
rows and for the columns of a matrix. With both, parameters of one dimension have exact normals of
each direction's own. The bits are the same on every device. The index of a name is its number in
csrc/adamezo/job.h.
"""

LARGEST_RANK = 64
"""The largest rank of a low-rank direction: kLargestRank of csrc/adamezo/low_rank.h."""

LARGEST_GROUP = 2**16
"""How many ``flipout`` directions may share their normals: kLargestGroup of
csrc/adamezo/flipout.h."""

NAMES_OF_DISTRIBUTIONS = (
    f"{DISTRIBUTIONS}, 'lowrank:2' to 'lowrank:{LARGEST_RANK}' or 'flipout:2' to "
    f"'flipout:{LARGEST_GROUP}'"
)
"""The names that :func:`kind_of` takes, for messages."""

LARGEST_FACTOR = 2**34
"""The largest number of rows, and of columns, of a parameter whose directions have factors."""

ROUNDINGS = ("nearest", "stochastic")
"""How a store to 16 bits rounds. ``stochastic`` rounds up with the probability of the fraction that
is cut off, so that its mean is the value: a step far below a weight's last place moves it now and
then instead of never. Its random bits belong to the direction (docs/directions.md): the same on
every device. The index of a name is its number in csrc/adamezo/rounding.h."""


class PhiloxState(NamedTuple):
    """One direction z of a run: three integers that determine a value for each weight.

    Element ``i`` of the parameter numbered ``parameter`` is one of the four outputs of
    Philox4x32-10 (Salmon et al., SC 2011) under the key ``key`` for the counter
    ``((i + offset) // 4, counter, parameter)``; so its value depends on the element's index, and
    not on the device, the number of threads or the way tensors are split.
    """

    key: int
    """The run's 64-bit seed."""
    counter: int
    """The 32-bit index of the direction: directions of a run are counted as they are drawn."""
    offset: int = 0
    """The first element: added to every element index."""


def kind_of(distribution: str) -> tuple[str, int]:
    """The name in DISTRIBUTIONS of a distribution, and its number: the rank of ``lowrank``, or how
    many directions of ``flipout`` share their normals. The number is 1 if none is given.

    Raises:
        ValueError: there is no such distribution.
    """
    if distribution in DISTRIBUTIONS:
        return distribution, 1
    if isinstance(distribution, str):
        name, _, digits = distribution.partition(":")
        most = {"lowrank": LARGEST_RANK, "flipout": LARGEST_GROUP}.get(name, 0)
        # "lowrank:1" and "lowrank:04" would be second names for the same directions.
        if digits.isdecimal() and 2 <= int(digits) <= most and str(int(digits)) == digits:
            return name, int(digits)
    raise ValueError(f"distribution must be one of {NAMES_OF_DISTRIBUTIONS}, got {distribution!r}")


_BITS = (("key", 64), ("counter", 32), ("offset", 63))


def check_state(state: PhiloxState) -> None:
    """Raises ValueError where a field of ``state`` does not fit its bits."""
    for field, bits in _BITS:
        value = getattr(state, field, None)
        if not isinstance(value, int) or value < 0 or value >> bits:
            raise ValueError(
                f"PhiloxState.{field} must be an integer in [0, 2**{bits}), got {value!r}"
            )
