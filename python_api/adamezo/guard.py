"""What a closure does to the weights themselves: nothing, or it is told so."""

from __future__ import annotations

from collections.abc import Sequence

from adamezo_kernels import Plan
from adamezo_kernels.plan import memory_of


class Guard:
    """Sees what a closure does to the weights themselves, which it must not."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._names = [name for plan in plans for name in plan.names]
        self._weights = [segment.tensor for plan in plans for segment in plan]
        self._memory = [memory_of(p) for p in self._weights]
        self._data = [p.detach() for p in self._weights]  # keeps memory that p may let go of
        # Inference tensors do not count their versions.
        self._counting = [not p.is_inference() for p in self._weights]
        self._versions: list[int] = []
        self._replaced = False
        self.written = False

    def look(self) -> None:
        """The weights are in order: what they are now is what :meth:`check` expects."""
        pairs = zip(self._weights, self._counting, strict=True)
        self._versions = [p._version if counts else 0 for p, counts in pairs]

    def check(self) -> None:
        """Raises RuntimeError if weights were written or replaced since."""
        problems = self._find()
        if problems:
            raise RuntimeError(
                f"the closure has {'; '.join(problems)}. It must only evaluate the model: the "
                "weights move in the step around it"
            )

    def put_back(self) -> None:
        """Gives weights their memory back, and notices what :meth:`check` did not come to see."""
        self._find()
        if self._replaced:
            for p, memory, data in zip(self._weights, self._memory, self._data, strict=True):
                if memory_of(p) != memory:
                    p.data = data

    def _find(self) -> list[str]:
        if not self._versions:
            return []
        written, replaced = [], []
        for i, p in enumerate(self._weights):
            if memory_of(p) != self._memory[i]:
                replaced.append(self._names[i])
            elif self._counting[i] and p._version != self._versions[i]:
                written.append(self._names[i])
        self._versions = []
        self.written = self.written or bool(written)
        self._replaced = self._replaced or bool(replaced)
        return [
            f"{did} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" * (len(names) > 3))
            for did, names in (
                ("written to", written),
                ("replaced, resized or moved (what they were is put back)", replaced),
            )
            if names
        ]
