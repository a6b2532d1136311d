"""Random calls of every operation and rule: launched, and by the CPU's kernels, bit for bit. Where
those lack the distribution, the bodies on the host stand for them.

    python -m ptx.fuzz --seed 1 --count 300
"""

from __future__ import annotations

import argparse
import collections
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from . import launched  # before the package, whose module it is

# isort: split
from adamezo_kernels import RULES, PhiloxState, Plan, Terms
from adamezo_kernels.backends import cuda, native
from adamezo_kernels.call import Call
from adamezo_kernels.stream import ROUNDINGS
from adamezo_kernels.terms import OPERATIONS
from helpers.operations import TYPES, assert_same_bits
from helpers.rules import NUMBERS

CORNERS = (0.0, -0.0, 1e-45, -1e-40, 6e-8, -3e-8, 2**-14, 2**-24, 65504, 65519, 3.3e38, 2**-25)
CORNERS += (float("inf"), -float("inf"), float("nan"))
SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 31, 127, 511, 512, 513, 1024)
OFFSETS = (0, 0, 1, 511, 2**32 + 3, 2**34 - 700, 2**34, 2**39 - 700, 2**41 + 129)
ROWS = (None, None, (3, 5), (300, 311))  # (elements, elements from one row to the next)
MANY = (257, 961, 2100)  # directions; the last two need more shared memory than comes unasked


@dataclass(frozen=True)
class Case:
    operation: str
    rule: str
    distribution: str
    rounding: str
    dtype: torch.dtype
    buffer_dtype: torch.dtype
    sizes: tuple[int, ...]
    rows: tuple[int, int] | None
    horizon: int
    with_second: bool
    offset: int
    into: bool
    seed: int
    carried: bool
    """Whether launches carry the words, where these are not too many."""

    @classmethod
    def random(cls, seed: int) -> Case:
        rnd = random.Random(seed)
        operation = rnd.choice(OPERATIONS)
        rules = ["moments"]
        if operation == "update":
            rules += [rule for rule in RULES if RULES[rule].updates and rule != "moments"]
        if operation == "perturb":
            rules += [rule for rule in RULES if RULES[rule].has_direction]
        rule = rnd.choice([*rules, "moments"])
        horizon = RULES[rule].directions if rule != "moments" else rnd.choice((1, 1, 2, 3, 10, 33))
        sizes = [rnd.choice((*SIZES, rnd.randrange(3000))) for _ in range(rnd.choice((1, 2, 5)))]
        kind = rnd.random()
        if kind < 0.08:  # more windows than warps of the first device of launch()
            sizes.append(rnd.randrange(210_000, 300_000))
            horizon = min(horizon, 3)
        elif kind < 0.16 and rule == "moments":
            horizon = rnd.choice(MANY)
            sizes = [min(size, 600) for size in sizes]
        return cls(
            operation=operation,
            rule=rule,
            distribution=rnd.choice(cuda.DISTRIBUTIONS),
            rounding=rnd.choice(ROUNDINGS) if operation in ("perturb", "update") else "nearest",
            dtype=torch.float32 if operation == "moment" else rnd.choice(TYPES),
            buffer_dtype=rnd.choice(TYPES),
            sizes=tuple(sizes),
            rows=rnd.choice(ROWS),
            horizon=horizon,
            with_second=rule == "moments" and operation != "perturb" and rnd.random() < 0.6,
            offset=rnd.choice((*OFFSETS, rnd.randrange(2**50))),
            into=operation == "perturb" and rnd.random() < 0.4,
            seed=seed,
            carried=rnd.random() < 0.7,
        )

    def terms(self, offset: int) -> Terms:
        rnd = random.Random(self.seed + 1)
        key = rnd.randrange(2**64)
        states = [PhiloxState(key, rnd.randrange(2**32), offset) for _ in range(self.horizon)]
        moments = self.rule == "moments"
        return Terms.of(
            states,
            [rnd.gauss(0, 1) for _ in states] if moments else None,
            [rnd.random() for _ in states] if self.with_second else None,
            minus_lr=-0.02,
            decay=rnd.choice((1.0, 0.99)),
            rule=self.rule,
            numbers=() if moments else NUMBERS[self.rule],
        )

    def call(self) -> tuple[Call, list[Tensor]]:
        """The call on tensors of its own, and all their memory, margins included."""
        rnd = random.Random(self.seed + 2)
        memory: list[Tensor] = []

        def make(numel: int, dtype: torch.dtype) -> Tensor:
            memory.append(torch.full((numel + 160,), float("nan"), dtype=dtype))
            assert memory[-1].data_ptr() % 64 == 0, "the same places would be aligned otherwise"
            begin = 64 + rnd.randrange(9)
            return memory[-1][begin : begin + numel].copy_(values(numel, rnd.randrange(2**40)))

        tensors = []
        for size in self.sizes:
            if self.rows and size:
                length, stride = self.rows
                count = -(-size // length)
                wide = make(count * stride, self.dtype).view(count, stride)
                tensors.append(wide[:, 1 : 1 + length])
            else:
                tensors.append(make(size, self.dtype))
        plan = Plan(tensors)
        if kept := RULES[self.rule].buffers:
            buffers = [[make(t.numel(), self.buffer_dtype) for _ in range(kept)] for t in tensors]
            for i, of in enumerate(buffers):
                of[-1].copy_(of[-1].abs())  # curvatures and second moments are no less than 0
                buffers[i] = [buffer.view(tensors[i].shape) for buffer in of]
            plan = plan.with_buffers(buffers)
        if self.into:
            plan = plan.into([make(t.numel(), self.dtype).view(t.shape) for t in tensors])
        scale = rnd.choice((0.0, 1e-3, -0.5)) if self.operation == "update" else 1e-2
        offset = self.offset
        if self.distribution == "lowrank":
            offset = min(offset, plan.largest_matrix_offset)
        terms = self.terms(offset)
        call = Call(self.operation, plan, terms, self.distribution, self.rounding, scale, 1e-8)
        return call, memory


def values(numel: int, seed: int) -> Tensor:
    """Of many sizes, and among them what float arithmetic has in its corners."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(numel, generator=generator)
    found *= 10 ** (8 * torch.rand(numel, generator=generator) - 6)
    if numel and seed % 2:
        at = torch.randint(numel, (numel // 20 + 1,), generator=generator)
        found[at] = torch.tensor(CORNERS)[at % len(CORNERS)]
    return found


class Device(launched.Place):
    case: Case

    def run(self, job, highs) -> None:
        launched.launch(job, highs, Device.case.seed % 3 + 1, Device.case.seed)


class Host(launched.Place):
    def run(self, job, highs) -> None:
        launched.on_host(job, highs, 3, 64)


MOST_CARRIED = cuda.MOST_CARRIED


def check(case: Case) -> None:
    Device.case = case
    cuda.MOST_CARRIED = MOST_CARRIED if case.carried else 0
    cuda.Place = Device
    call, got = case.call()
    cuda.run(call)
    cuda.Place = Host
    by = native if case.distribution in native.DISTRIBUTIONS else cuda
    call, expected = case.call()
    by.run(call)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a, b, f"array {i}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--count", type=int, default=300)
    given = options.parse_args()
    torch.set_num_threads(1)
    kinds: collections.Counter = collections.Counter()
    for seed in range(given.seed, given.seed + given.count):
        case = Case.random(seed)
        try:
            check(case)
        except (AssertionError, RuntimeError) as error:
            raise SystemExit(f"{case}\n{error}") from None
        kinds[case.operation, case.rule, case.distribution] += 1
    launched.report()
    print(f"{given.count} random calls of {len(kinds)} operations, rules and distributions")


if __name__ == "__main__":
    main()
