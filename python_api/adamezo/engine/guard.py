"""A guard of the weights around a closure, which must not write or replace them."""

from __future__ import annotations

from adamezo_kernels.plan import memories_of

from .weights import Weights


class Guard:
    """Finds out, in one step, whether a closure has written, replaced or resized weights.

    Attributes:
        written (bool): whether it has written some, whose values are not known then.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._data = [p.detach() for p in weights.tensors]
        self._versions: list[int] | None = None
        self._replaced = False
        self.written = False

    def expect_unchanged(self) -> None:
        """An evaluation begins: from now on, the weights must stay as they are."""
        self._versions = self._weights.versions()

    def check(self) -> None:
        """Raises RuntimeError if weights were written or replaced since."""
        problems = self._find()
        if problems:
            raise RuntimeError(
                f"the closure has {'; '.join(problems)}. It must only evaluate the model: the "
                "weights move in the step around it"
            )

    def put_back(self) -> None:
        """Gives weights their memory back, also where an evaluation ended without a check."""
        self._find()
        if self._replaced:
            memories = memories_of(self._weights.tensors)
            for i, p in enumerate(self._weights.tensors):
                if memories[i] != self._weights.memories[i]:
                    p.data = self._data[i]

    def _find(self) -> list[str]:
        versions, self._versions = self._versions, None
        if versions is None:
            return []
        weights = self._weights
        now, memories = weights.versions(), memories_of(weights.tensors)
        if now == versions and memories == weights.memories:
            return []
        written, replaced = [], []
        for i, name in enumerate(weights.names):
            if memories[i] != weights.memories[i]:
                replaced.append(name)
            elif now[i] != versions[i]:
                written.append(name)
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
