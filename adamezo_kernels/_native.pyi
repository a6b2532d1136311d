"""Type stubs of the compiled module, csrc/bindings.cpp, which is absent if nothing was compiled."""

from collections.abc import Sequence

class Job:
    def __init__(
        self,
        operation: int,
        distribution: int,
        table: int,
        segments: int,
        elements: int,
        type: int,
        seed: int,
        offset: int,
        words: int,
        horizon: int,
        with_second: bool,
        rule: int,
        buffer_type: int,
        scale: float,
        eps: float,
        rounding: int,
    ) -> None: ...

def run(job: Job, isa: str, threads: int) -> None: ...
def cuda_on_host(job: Job, highs: Sequence[int], blocks: int, threads: int) -> None: ...
def cuda_launch(job: Job, highs: Sequence[int], device: int, stream: int) -> None: ...
def cuda_check_sqrt(count: int, device: int, stream: int) -> None: ...
def philox(counter: Sequence[int], key: int, rounds: int = 10) -> list[int]: ...
def rules() -> list[str]: ...
def instruction_sets() -> list[str]: ...
def build_report() -> dict[str, str]: ...
def cuda_report() -> dict[str, int | str]: ...
