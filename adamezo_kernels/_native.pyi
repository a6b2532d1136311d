"""Types of the compiled module, csrc/bindings.cpp. Absent where nothing was compiled."""

from collections.abc import Sequence

class Table:
    def __init__(self, address: int, segments: int, elements: int, type: int) -> None: ...

def sample(
    isa: str,
    threads: int,
    table: Table,
    seed: int,
    offset: int,
    distribution: int,
    direction: int,
) -> None: ...
def perturb(
    isa: str,
    threads: int,
    table: Table,
    seed: int,
    offset: int,
    distribution: int,
    direction: int,
    scale: float,
    rounding: int,
) -> None: ...
def update(
    isa: str,
    threads: int,
    table: Table,
    seed: int,
    offset: int,
    distribution: int,
    directions: Sequence[int],
    first: Sequence[float],
    second: Sequence[float] | None,
    restore: float,
    minus_lr: float,
    eps: float,
    decay: float,
    rounding: int,
) -> None: ...
def moment(
    isa: str,
    threads: int,
    table: Table,
    seed: int,
    offset: int,
    distribution: int,
    directions: Sequence[int],
    coefficients: Sequence[float],
    squared: bool,
) -> None: ...

class CudaJob:
    def __init__(
        self,
        *,
        operation: int,
        distribution: int,
        table: Table,
        seed: int,
        offset: int,
        directions: int,
        horizon: int,
        with_second: bool,
        scale: float,
        minus_lr: float,
        eps: float,
        decay: float,
        rounding: int,
        highs: Sequence[int],
    ) -> None: ...

def cuda_directions(
    address: int,
    directions: Sequence[int],
    first: Sequence[float] | None,
    second: Sequence[float] | None,
) -> None: ...
def cuda_on_host(job: CudaJob, blocks: int, threads: int) -> None: ...
def cuda_launch(job: CudaJob, device: int, stream: int) -> None: ...
def cuda_check_sqrt(count: int, device: int, stream: int) -> None: ...
def philox(counter: Sequence[int], key: int, rounds: int = 10) -> list[int]: ...
def instruction_sets() -> list[str]: ...
def build_report() -> dict[str, str]: ...
def cuda_report() -> dict[str, int | str]: ...
