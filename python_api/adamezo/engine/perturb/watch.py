"""A watch over every operation that torch runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Shows every operation to a function, those inside of torch's own too, and runs it."""

    supports_higher_order_operators = True

    def __init__(self, look: Callable[[Any, object], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._look(func, (args, kwargs))
        return func(*args, **kwargs)


def written_by(operation: Any, arguments: Any) -> list[Tensor]:
    """The tensors that an operation writes to."""
    schema = getattr(operation, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    args, kwargs = arguments
    written = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return written
