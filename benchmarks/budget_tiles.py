"""What do Triton's kernels cost that work on tiles: low-rank directions, and products?

    python -m benchmarks.budget_tiles

As benchmarks/budget.py, for the kernels of its own file budget_tiles.csv: bfloat16 weights and an
H100. The instructions are those of the usual path of a whole tile, with a perturbation taken back
in an update. Of a direction of rank 1 they are counted as a normal's. Those of a product with 128
rows of x are of its loop, for an element of W.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from adamezo_kernels.backends import products, tiling
from adamezo_kernels.backends import triton as triton_backend
from benchmarks.budget import SIGNATURE, TARGETS, compiler, number, without_triton
from benchmarks.budget_kernels import Budget, Kernel
from benchmarks.results import Row, conditions, parser, write
from benchmarks.sass import Instruction, cuobjdump, instructions, nested_loops, run

KERNELS = [
    *(Kernel(o, "lowrank", s) for o in ("perturb", "update") for s in (False, True)),
    *(Kernel("product", distribution, False) for distribution in ("exact", "rademacher")),
]
ROWS_OF_X = 128

_POINTERS = {"float32": "*fp32", "bfloat16": "*u16", "float16": "*fp16"}


@functools.cache
def compiled_tiles(
    target: str,
    operation: str,
    type: str = "bfloat16",
    second: bool = True,
    stochastic: bool = False,
    rule: str = "moments",
    kept: str = "",
) -> Any:
    """The kernel of low-rank directions, compiled as a call would: Triton's CompiledKernel."""
    backend, _, warp = TARGETS[target]
    shared = triton_backend.constants(
        *(operation, "exact", type, kept),
        second=second and operation in ("update", "moment") and rule == "moments",
        stochastic=stochastic,
        rule=rule,
        on=backend,
    )
    return _compiled(
        target,
        triton_backend.tiles().run,
        SIGNATURE | {"rank": "i32", "row_scale": "i32"},
        tiling.tile_constants(shared),
        triton_backend.options(warp, tiling.tile_threads(rule)),
    )


@functools.cache
def compiled_product(
    target: str,
    distribution: str,
    type: str = "bfloat16",
    rows: int = ROWS_OF_X,
    bias: bool = False,
    inner: int = 4,
) -> Any:
    """The kernel of products, compiled for contiguous matrices of usual sizes."""
    backend, _, warp = TARGETS[target]
    signature = {
        **dict.fromkeys(("y", "x", "weight", "bias"), _POINTERS[type]),
        "words": "*i32",
        **dict.fromkeys(("perturbations",), "i32"),
        **dict.fromkeys(("rows", "count", "inner", "stride", "bias_stride"), "i64"),
        "parameter": "i32",
    }
    fixed = products.constants(distribution, type, bias, inner, rows, backend)
    names = list(signature)
    multiples = ("y", "x", "weight", "bias", "count", "inner", "stride")
    aligned = [names.index(name) for name in multiples]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned} if inner % 4 == 0 else {}
    return _compiled(
        target, products.kernel(), signature, fixed, products.options(warp), attrs=attrs
    )


def _compiled(
    target: str,
    kernel: Any,
    signature: dict[str, str],
    fixed: dict[str, Any],
    options: dict[str, Any],
    **more: Any,
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = signature | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed, **more)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def made_of(compiled: Any) -> tuple[int, int, list[Instruction]]:
    """The registers of a thread, the bytes spilled and the instructions of a kernel for NVIDIA."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage, sass = (run(cuobjdump(), what, str(binary)) for what in ("-res-usage", "-sass"))
    spilled = number(r"STACK:(\d+)", usage)
    return number(r"REG:(\d+)", usage), spilled, list(instructions(sass))


def counted(kernel: Kernel) -> Budget:
    """The counts of one kernel for an H100."""
    threads = triton_backend.THREADS
    if kernel.operation == "product":
        compiled = compiled_product("cuda:90", kernel.distribution)
        _, out, inner = products.TILES["bfloat16"]
        elements = out * inner // threads
    else:
        compiled = compiled_tiles("cuda:90", kernel.operation, stochastic=kernel.stochastic)
        elements = tiling.ROWS * tiling.COLUMNS // threads
    registers, spilled, code = made_of(compiled)
    program, loop, term, _ = nested_loops(code, whole_program=True, tiles=True)
    if kernel.operation == "product":
        normal, weight = 0 * loop, loop
    elif kernel.operation == "update":
        # Loops over terms beyond the first are in the loop over directions, before and behind it.
        normal, weight = loop - term, program - loop - 2 * term
    else:
        normal, weight = 0 * loop, program - loop
    return Budget(kernel, registers, spilled, normal / elements, weight / elements)


def main() -> None:
    arguments = parser(__doc__, "budget_tiles.csv").parse_args()
    if lack := without_triton():
        raise SystemExit(f"budget_tiles: {lack}")
    where = conditions(device="sm_90", clock_hz=None, compiler=compiler("Triton"))
    made: list[Row] = []
    for b in map(counted, KERNELS):
        made += b.rows("Triton", where)
        counts = f"{b.per_normal:.2f} a normal, {b.per_weight:.1f} a weight"
        used = f"{b.registers} registers, {b.spilled_bytes} B spilled"
        print(f"{b.kernel.what}, {b.kernel.variant}: {used}, {counts}", flush=True)
    write(arguments.output, made)
    print(f"{len(made)} rows: {arguments.output.name}")


if __name__ == "__main__":
    main()
