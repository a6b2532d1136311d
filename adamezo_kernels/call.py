"""One operation on the tensors of a plan, with all the arguments of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .float32 import FLOAT32_MAX
from .plan import Plan
from .rules import RULES
from .stream import LARGEST_FACTOR, ROUNDINGS, kind_of
from .terms import OPERATIONS, Terms

_FLOAT32_HALF_MIN = 2.0**-150  # rounds to 0


@dataclass(frozen=True)
class Call:
    """The arguments of one operation, from an optimizer to a kernel. The constructor checks them,
    so that every backend gets valid input and all give the same messages.

    The values in ``terms`` are not checked: on a GPU that would wait for the device.

    Raises:
        TypeError, ValueError: the message says what was got and what was expected.
    """

    operation: str
    """One of OPERATIONS."""
    plan: Plan
    terms: Terms
    """A perturbation whose rule has no direction of its own takes the first direction alone."""
    distribution: str = "exact"
    rounding: str = "nearest"
    scale: float = 0.0
    """The scale of a perturbation; in an update, of the one that is added back first, if not 0."""
    eps: float = 0.0

    def __post_init__(self) -> None:
        plan = self.plan
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be an adamezo_kernels.Plan, got {type(plan).__name__}")
        check_choice("operation", self.operation, OPERATIONS)
        name, _ = kind_of(self.distribution)
        check_choice("rounding", self.rounding, ROUNDINGS)
        fields = vars(self)  # as the record is frozen
        fields["scale"] = self._checked_scale(self.scale)
        fields["eps"] = checked_number("eps", self.eps)
        if self.operation != "perturb":
            check_in_place(plan)
        if name in ("lowrank", "flipout"):
            plan.check_matrices()
        fields["terms"] = self._checked_terms(self.terms)

    def vary(self, *, terms: Terms | None = None, scale: float | None = None) -> Call:
        """A copy of this call with other directions or another scale.

        It costs less than a new call, as unchanged fields are not checked again: a step makes three
        perturbations that differ in nothing else.
        """
        call = object.__new__(Call)
        fields = vars(call)
        fields.update(vars(self))
        if scale is not None:
            fields["scale"] = self._checked_scale(scale)
        if terms is not None:
            fields["terms"] = self._checked_terms(terms)
        return call

    def on(self, plan: Plan) -> Call:
        """A copy of this call on ``plan``: copies of a part of its own. It is not checked again."""
        call = object.__new__(Call)
        vars(call).update(vars(self), plan=plan)
        return call

    def _checked_scale(self, scale: float) -> float:
        return checked_number("restore" if self.operation == "update" else "scale", scale)

    def _checked_terms(self, terms: Terms) -> Terms:
        """The terms for the backend, checked against all other fields."""
        plan = self.plan
        if terms.offset + plan.last_index >= 2**63:
            raise ValueError(
                f"PhiloxState.offset {terms.offset} leads to element indices beyond 2**63, as the "
                f"plan's element indices reach {plan.last_index}"
            )
        of_matrices = self.distribution.startswith(("lowrank", "flipout"))
        if of_matrices and terms.offset > plan.largest_matrix_offset:
            raise ValueError(
                f"PhiloxState.offset {terms.offset} leads to rows beyond {LARGEST_FACTOR:,}, the "
                "most that low-rank and flipout directions have: expected an offset of at most "
                f"{plan.largest_matrix_offset}"
            )
        if not terms.words.is_cpu and plan.devices != {terms.words.device}:
            where = terms.words.device
            elsewhere = sorted(str(device) for device in plan.devices if device != where)
            if elsewhere:
                raise ValueError(
                    f"the terms are on {where} and weights on {', '.join(elsewhere)}: expected "
                    "terms on the host, or on the device of all weights"
                )
        if self.operation == "perturb" and not RULES[terms.rule].has_direction:
            terms = terms.newest
        rule = RULES[terms.rule]
        if plan.buffers < rule.buffers and len(plan):
            raise ValueError(
                f"the rule {terms.rule!r} needs {rule.buffers} buffer(s) for each weight, the plan "
                f"has {plan.buffers}: pass `plan.with_buffers(...)`"
            )
        if self.operation == "update":
            if not rule.updates:
                raise ValueError(
                    f"the rule {terms.rule!r} only perturbs: expected terms of an update"
                )
            if terms.with_second and self.eps <= _FLOAT32_HALF_MIN:
                raise ValueError(
                    f"eps must be positive in float32 where `second` is given, got {self.eps}"
                )
        return terms


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def check_in_place(plan: Plan) -> None:
    if not plan.in_place:
        raise ValueError(
            "this plan reads one set of tensors and writes another (Plan.into), which only "
            "perturb_ can do"
        )


def checked_number(name: str, value: float) -> float:
    """``value`` as a float that float32 can hold."""
    value = float(value)
    if not abs(value) <= FLOAT32_MAX:  # the comparison is false for a NaN
        raise ValueError(f"{name} must be finite and within float32, got {value}")
    return value


def checked_numbers(name: str, values: Sequence[float]) -> list[float]:
    """``values`` as floats that float32 can hold."""
    numbers = list(map(float, values))
    if not sum(map(abs, numbers)) <= FLOAT32_MAX:  # otherwise none exceeds it
        for number in numbers:
            checked_number(name, number)
    return numbers
