"""A control for AdaMeZO: the same truncated momentum, over one number in the place of v."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..optimizer import ZerothOrder
from .adamezo import AdaMeZO


class ScalarAdaMeZO(AdaMeZO):
    """AdaMeZO with the mean of v over all weights in the place of v: of no paper, a control.

    As z^2 is 1 on average, that mean is the same sum without the directions. With c1 and c2 of the
    ``normalization`` (:mod:`adamezo.methods.history`)::

        m = c1 sum_k beta1^k p_k z_k        rms^2 = c2 sum_k beta2^k p_k^2
        theta <- theta (1 - lr weight_decay) - lr m / (rms + eps)

    What AdaMeZO does better than this, it owes to a v of each weight's own. Arguments are those of
    :class:`AdaMeZO`; ``capturable`` is refused.
    """

    # AdaMeZO's forms v.
    _resident_history = ZerothOrder._resident_history  # type: ignore[assignment]

    def _coefficients(
        self, grads: Sequence[float], group: dict[str, Any]
    ) -> tuple[Sequence[float], Sequence[float] | None]:
        m, v = super()._coefficients(grads, group)
        if v is None:
            return m, None
        root = math.sqrt(sum(v)) + group["eps"]
        return [value / root for value in m], None
