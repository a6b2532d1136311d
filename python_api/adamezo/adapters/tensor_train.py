"""Linear maps and adapters whose weights are tensor trains: products of small cores."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}
INITS = ("published", "zero")


def whole(name: str, value: object) -> int:
    """A whole number of any library as Python's.

    Raises:
        ValueError: it is none.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise ValueError(f"Invalid {name}: {value!r}, expected a whole number")


def factorise(size: int, count: int = 3) -> tuple[int, ...]:
    """``count`` whole numbers with the product ``size`` and the smallest sum, in rising order: 4096
    is (16, 16, 16), 576 is (8, 8, 9), and a prime is (1, 1, itself)."""
    size, count = whole("size", size), whole("count", count)
    if size < 1 or count < 1:
        raise ValueError(
            f"factorise: got size {size} and count {count}, expected 1 or more of each"
        )
    return min(_factorisations(size, count, 1), key=sum)


def _factorisations(size: int, count: int, least: int) -> list[tuple[int, ...]]:
    """All of them, in rising order, with factors of ``least`` or more."""
    if count == 1:
        return [(size,)] if size >= least else []
    found = []
    factor = least
    while factor**count <= size:
        if size % factor == 0:
            rest = _factorisations(size // factor, count - 1, factor)
            found += [(factor, *others) for others in rest]
        factor += 1
    return found


class TensorTrainLinear(nn.Module):
    """A linear map whose matrix is a tensor train (arXiv 2406.18060)::

        W[(i1 .. in), (o1 .. om)] = C1[i1] C2[i2] .. Cn[in] D1[o1] .. Dm[om]
        y = x W + bias

    Each core is a stack of matrices of shape (rank before, rank after), one for each value of its
    index, of shape (rank before, dimension, rank after) in memory. Row and column numbers of W are
    written in the dimensions of the cores, the first one being the most significant.

    The cores of the inputs are multiplied to a matrix (in_features, r) and those of the outputs to
    one (r, out_features), with r the rank between the two. That costs as much as a few rows of x,
    and x then takes two thin products.

    Args:
        in_features, out_features: as of :class:`torch.nn.Linear`.
        rank: of every bond between two cores, or a sequence with that of each.
        bias: whether a bias is added, 0 at first.
        in_dims, out_dims: the dimensions of the cores, with these products; by default three each,
            of :func:`factorise`.
        init: ``"published"`` draws all cores from one normal distribution, such that an element of
            W has the standard deviation sqrt(1 / (in_features + out_features)); ``"zero"`` is the
            same with the last core 0, so that W is 0 at first.
        generator: of the CPU, to draw the cores from; torch's own by default.
        dtype: of cores and bias. x is converted to it, and y to the type of x.
    """

    core0: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | Sequence[int] = 5,
        *,
        bias: bool = True,
        in_dims: Sequence[int] | None = None,
        out_dims: Sequence[int] | None = None,
        init: str = "published",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"Invalid init: {init!r}, expected one of {INITS}")
        in_features = whole("in_features", in_features)
        out_features = whole("out_features", out_features)
        self.in_features, self.out_features = in_features, out_features
        self.in_dims = _dims("in_dims", in_dims, in_features)
        self.out_dims = _dims("out_dims", out_dims, out_features)
        dims = self.in_dims + self.out_dims
        if isinstance(rank, (list, tuple)):
            ranks = [whole("rank", each) for each in rank]
        else:
            ranks = [whole("rank", rank)] * (len(dims) - 1)
        if len(ranks) != len(dims) - 1 or any(r < 1 for r in ranks):
            raise ValueError(
                f"Invalid rank: {rank}, expected a positive number, or {len(dims) - 1} of them, "
                f"one between each two of the {len(dims)} cores"
            )
        self.ranks = tuple(ranks)
        # The variance of W's element is that of a core's to the power of the number of cores, times
        # the number of paths through the bonds.
        paths = math.prod(ranks)
        std = (1 / (in_features + out_features) / paths) ** (0.5 / len(dims))
        self._names = [f"core{k}" for k in range(len(dims))]
        shapes = zip([1, *ranks], dims, [*ranks, 1], strict=True)
        for name, shape in zip(self._names, shapes, strict=True):
            core = torch.empty(shape, dtype=dtype, device="cpu")
            core.normal_(0.0, std, generator=generator)
            if init == "zero" and name == self._names[-1]:
                core.zero_()
            # Parameters of this module itself, which reads them in its forward.
            self.register_parameter(name, nn.Parameter(core))
        added = torch.zeros(out_features, dtype=dtype, device="cpu") if bias else None
        self.register_parameter("bias", None if added is None else nn.Parameter(added))

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """The cores, from the first of the inputs to the last of the outputs."""
        return tuple(getattr(self, name) for name in self._names)

    def _thin(self) -> tuple[Tensor, Tensor]:
        """Two matrices with the product W, (in_features, r) and (r, out_features)."""
        cores, inner = self.cores, len(self.in_dims)
        return _product(cores[:inner])[0], _product(cores[inner:])[..., 0]

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (..., in_features) to (..., out_features).

        Raises:
            TypeError: x has no floating-point numbers, which y's would be cut to.
        """
        if not x.is_floating_point():
            raise TypeError(f"a TensorTrainLinear got {x.dtype}, expected floating-point numbers")
        down, up = self._thin()
        y = x.to(down.dtype) @ down @ up
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def dense(self) -> Tensor:
        """The matrix as :class:`torch.nn.Linear` has it, of shape (out_features, in_features)."""
        down, up = self._thin()
        return (down @ up).T

    def to_linear(self) -> nn.Linear:
        """A dense layer that computes the same."""
        weight, bias = self.dense().detach(), self.bias
        linear = nn.Linear(
            self.in_features, self.out_features, bias is not None, weight.device, weight.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        return linear.requires_grad_(self.core0.requires_grad)

    def extra_repr(self) -> str:
        dims = f"in_dims={self.in_dims}, out_dims={self.out_dims}, ranks={self.ranks}"
        return f"{self.in_features}, {self.out_features}, {dims}, bias={self.bias is not None}"


def _dims(name: str, dims: Sequence[int] | None, size: int) -> tuple[int, ...]:
    chosen = factorise(size) if dims is None else tuple(whole(name, each) for each in dims)
    if not chosen or any(d < 1 for d in chosen) or math.prod(chosen) != size:
        raise ValueError(f"Invalid {name}: {dims}, expected positive numbers with product {size}")
    return chosen


def _product(cores: Sequence[Tensor]) -> Tensor:
    """The product of a chain of cores: (first rank, product of the dimensions, last rank)."""
    product = cores[0]
    for core in cores[1:]:
        rank = core.shape[0]
        product = product.reshape(-1, rank) @ core.reshape(rank, -1)
        product = product.reshape(cores[0].shape[0], -1, core.shape[2])
    return product


class TensorTrainAdapter(nn.Module):
    """A residual adapter, x + up(activation(down(x))), whose two maps are tensor trains.

    Args:
        width: the size of x's last dimension.
        bottleneck: what ``down`` maps to.
        rank, bias, generator, dtype: of both maps, see :class:`TensorTrainLinear`.
        activation: ``"relu"`` or ``"tanh"``.
        init: ``"published"`` is that of both maps; ``"zero"`` has the last core of ``up`` 0, so
            that the adapter changes nothing at first.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int = 64,
        rank: int | Sequence[int] = 5,
        *,
        activation: str = "relu",
        bias: bool = True,
        init: str = "published",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Invalid activation: {activation!r}, expected one of {tuple(ACTIVATIONS)}"
            )

        def linear(inputs: int, outputs: int, init: str) -> TensorTrainLinear:
            return TensorTrainLinear(
                inputs, outputs, rank, bias=bias, init=init, generator=generator, dtype=dtype
            )

        self.activation = activation
        self.down = linear(width, bottleneck, "published")
        self.up = linear(bottleneck, width, init)

    def forward(self, x: Tensor) -> Tensor:
        inner = x.to(self.down.core0.dtype)  # 16-bit numbers are not rounded between the two maps
        change = self.up(ACTIVATIONS[self.activation](self.down(inner)))
        return x + change.to(x.dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
