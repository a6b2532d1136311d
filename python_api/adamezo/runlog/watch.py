"""Changes between and during steps that a log cannot express."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adamezo_kernels.plan import memory_of

from ..engine.module_buffers import BufferMarks, tracking
from ..engine.optimizer import ZerothOrder
from ..engine.sharded import local
from .format import LogError
from .header import logged_options

_ADVICE = (
    "A log holds the weights and no module buffers: after a replay the model would have those of "
    "the base, and evaluate differently. Call model.eval() first (or give the norms "
    "track_running_stats=False), and begin again from the base weights; or, if the buffers are "
    "saved elsewhere or not wanted, pass module_buffers='ignore' to StepLog.create or resume"
)

_Marks = dict[int, tuple[str, object]]


class Watch:
    """Looks for changes of options, weights and module buffers, and refuses them.

    Args:
        optimizer: the optimizer whose steps are logged.
        module_buffers: ``"refuse"`` or ``"ignore"`` evaluations that write module buffers.
    """

    def __init__(self, optimizer: ZerothOrder, module_buffers: str) -> None:
        self._optimizer = optimizer
        self._watches_buffers = module_buffers != "ignore"
        self._options = logged_options(optimizer)
        self._weights = _weight_marks(optimizer)
        self._buffers: BufferMarks | None = None  # as they were before the step in progress
        self.written: list[str] = []

    def before_step(self) -> None:
        """Raises LogError if the log cannot express what has changed since the last step."""
        advice = "Save the weights and begin a new log there"
        options = logged_options(self._optimizer)
        if options != self._options:
            changed = [
                f"{name} of group {i} from {group.get(name)!r} to {value!r}"
                for i, (group, now) in enumerate(zip(self._options, options, strict=False))
                for name, value in now.items()
                if group.get(name) != value
            ]
            raise LogError(
                f"the log cannot express a change of {', '.join(changed) or 'the groups'}. {advice}"
            )
        weights = _weight_marks(self._optimizer)
        changed = [
            name for i, (name, mark) in weights.items() if self._weights.get(i) != (name, mark)
        ]
        if changed:
            raise LogError(
                f"since the last step {', '.join(changed)} was written, replaced, moved or frozen, "
                f"which the log cannot express. {advice}"
            )
        self._find_written_buffers()  # of a step that ended without a record
        self.check_buffers("an earlier step")
        if self._watches_buffers and self._optimizer.model is not None:
            self._buffers = BufferMarks(self._optimizer.model)

    def after_step(self) -> None:
        """Accepts the weights as the step has left them, and looks for module buffers it wrote."""
        self._weights = _weight_marks(self._optimizer)
        self._find_written_buffers()

    def _find_written_buffers(self) -> None:
        if self._buffers is not None:
            self.written += self._buffers.written(self._optimizer.plans)
            self._buffers = None

    def check_buffers(self, step: str, remark: str = "") -> None:
        """Raises LogError if evaluations have written module buffers."""
        if self.written:
            names = _abridged(self.written)
            raise LogError(f"the evaluations of {step} have written {names}. {_ADVICE}{remark}")


def check_modules(optimizer: ZerothOrder, module_buffers: str) -> None:
    """Raises LogError if evaluations would write module buffers that are to be refused."""
    if module_buffers not in ("refuse", "ignore"):
        raise ValueError(
            f"Invalid module_buffers: {module_buffers!r}, expected one of ('refuse', 'ignore')"
        )
    model = optimizer.model
    names = [] if module_buffers == "ignore" or model is None else tracking(model)
    if names:
        raise LogError(
            f"in train mode evaluations write the running statistics of {_abridged(names)}. "
            f"{_ADVICE}"
        )


def _abridged(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _weight_marks(optimizer: ZerothOrder) -> _Marks:
    """For each parameter its name, and marks that change when somebody writes or replaces the
    parameter or a tensor of its state: their memory and torch's count of writes."""
    marks: _Marks = {}
    for group in optimizer.param_groups:
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            kept = [t for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor)]
            mark = p.requires_grad and [
                (id(t), memory_of(t), t.is_inference() or t._version)
                for t in map(local, (p, *kept))
            ]
            marks[len(marks)] = names[i] if names else f"parameter {len(marks)}", mark
    return marks
