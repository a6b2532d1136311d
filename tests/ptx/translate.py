"""Translates PTX to C++ over machine.h, as far as nvcc makes PTX of the kernels in csrc/cuda.

    python translate.py kernels.ptx OUT 4 PATTERN

writes OUT_0.cpp to OUT_3.cpp, among which the kernels whose names fit the pattern are dealt out.
A register becomes a local variable, a label stays one, and an instruction becomes the call of a
function of its name. What is not known is an error, so that no instruction is skipped or guessed.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

# The name of an instruction without its type; the first letters of the types that it has here; the
# types of its operands, where T is its own type, U is u32, and P is pred.
INSTRUCTIONS = {
    "add": ("us", "TT"),
    "sub": ("us", "TT"),
    "mul.lo": ("us", "TT"),
    "mul.wide": ("us", "TT"),
    "mad.lo": ("us", "TTT"),
    "div": ("us", "TT"),
    "rem": ("us", "TT"),
    "min": ("usf", "TT"),
    "max": ("usf", "TT"),
    "neg": ("sf", "T"),
    "abs": ("f", "T"),
    "and": ("bp", "TT"),
    "or": ("bp", "TT"),
    "xor": ("bp", "TT"),
    "not": ("bp", "T"),
    "shl": ("b", "TU"),
    "shr": ("us", "TU"),
    "bfi": ("b", "TTUU"),
    "lop3": ("b", "TTTU"),
    "mov": ("usbfp", "T"),
    "selp": ("usbf", "TTP"),
    "cvta.to.global": ("u", "T"),
    "cvta.param": ("u", "T"),
    "add.rn": ("f", "TT"),
    "mul.rn": ("f", "TT"),
    "div.rn": ("f", "TT"),
    "fma.rn": ("f", "TTT"),
    "sqrt.rn": ("f", "T"),
    "rsqrt.approx.ftz": ("f", "T"),
    "rcp.approx.ftz": ("f", "T"),
    "sqrt.approx.ftz": ("f", "T"),
    "lg2.approx.ftz": ("f", "T"),
    "sin.approx.ftz": ("f", "T"),
    "cos.approx.ftz": ("f", "T"),
}
for relation in ("lt", "le", "gt", "ge"):
    INSTRUCTIONS[f"setp.{relation}"] = ("usf", "TT")
for relation in ("eq", "ne"):
    INSTRUCTIONS[f"setp.{relation}"] = ("busf", "TT")
for relation in ("neu", "nan"):
    INSTRUCTIONS[f"setp.{relation}"] = ("f", "TT")
TYPES = [a + n for a in "usb" for n in ("8", "16", "32", "64")] + ["f32", "pred"]
INTEGERS = [a + n for a in "us" for n in ("8", "16", "32", "64")]
CONVERSIONS = {f"cvt.{to}.{of}" for to in INTEGERS for of in INTEGERS} | {
    "cvt.f32.f16",
    "cvt.rn.f16.f32",
    "cvt.rn.bf16.f32",
    "cvt.rn.f32.s32",
}
SPECIAL_REGISTERS = {
    "%tid.x": "self.thread",
    "%ntid.x": "self.threads",
    "%ctaid.x": "self.block",
    "%nctaid.x": "self.blocks",
}


class Unknown(Exception):
    """PTX that is not translated."""


@dataclass
class Kernel:
    name: str
    most_threads: int
    parameters: list[int] = field(default_factory=list)
    """Where each parameter begins, and where the last one ends."""
    symbols: dict[str, int] = field(default_factory=dict)
    """Addresses: of parameters among the parameters, of arrays in shared memory."""
    static_shared: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    """The type of each variable that stands for a register."""
    lines: list[str] = field(default_factory=list)
    pieces: int = 0
    """Stretches of code that run as a whole, which are counted as covered or not."""

    def variable(self, register: str) -> str:
        """The C++ variable that stands for a register."""
        name = "_" + register[1:]
        if register[0] != "%" or name not in self.registers:
            raise Unknown(f"the register {register}")
        return name

    def value(self, operand: str, type_: str) -> str:
        """C++ for an operand of an instruction, as a value of a type."""
        if operand in SPECIAL_REGISTERS:
            value = SPECIAL_REGISTERS[operand]
        elif operand.startswith("%"):
            value = self.variable(operand)
        elif found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            value = f"b32(0x{found[1]})"
        elif re.fullmatch(r"-?\d+|0x[0-9a-f]+", operand):
            value = f"b64({int(operand, 0) % 2**64}ull)"
        elif operand in self.symbols:
            value = f"b64({self.symbols[operand]})"
        else:
            raise Unknown(f"the operand {operand}")
        return f"as<{type_}>({value})"

    def call(self, name: str, type_: str, operands: list[str]) -> str:
        letters, types = INSTRUCTIONS[name]
        if type_[0] not in letters or type_ not in TYPES or len(operands) != len(types):
            raise Unknown(f"{name}.{type_} of {len(operands)} operands")
        known = {"T": type_, "U": "u32", "P": "pred"}
        values = [self.value(o, known[t]) for o, t in zip(operands, types, strict=True)]
        function = name.replace(".", "_") + ("_" if name in ("and", "or", "xor", "not") else "")
        return f"{function}<{type_}>({', '.join(values)})"

    def access(self, opcode: str, operands: list[str]) -> str:
        """ld and st, of one element or of a vector of them."""
        found = re.fullmatch(
            r"(ld|st)(?:\.volatile)?(?:\.(global|shared|param))?(?:\.v([24]))?\.(\w+)", opcode
        )
        if not found or found[4] not in TYPES:
            raise Unknown(opcode)
        kind, space, count, type_ = found[1], found[2] or "generic", int(found[3] or 1), found[4]
        if kind == "st" and space in ("param", "generic"):
            raise Unknown(opcode)
        where, what = operands if kind == "st" else reversed(operands)
        registers = split(what.strip("{}"))
        if len(registers) != count:
            raise Unknown(f"{opcode} of {what}")
        size = int(type_[1:]) // 8
        place = self.place(where, "u32" if space == "shared" else "u64")
        text = f"auto* at = {space}<{size * count}, k{kind.title()}>(self, {place});"
        for i, register in enumerate(registers):
            if kind == "ld":
                text += f" set({self.variable(register)}, read<{type_}>(at + {size * i}));"
            else:
                text += f" write(at + {size * i}, {self.value(register, type_)});"
        return f"{{ {text} }}"

    def place(self, operand: str, type_: str) -> str:
        """C++ for an address in brackets."""
        found = re.fullmatch(r"\[([%$\w]+)(?:\+(-?\d+))?\]", operand)
        if not found:
            raise Unknown(f"the address {operand}")
        return f"{self.value(found[1], type_)} + {type_}({int(found[2] or 0) % 2**64}ull)"

    def instruction(self, opcode: str, operands: list[str]) -> str:
        name, _, type_ = opcode.rpartition(".")
        if name in INSTRUCTIONS and not any("{" in operand for operand in operands):
            return f"set({self.variable(operands[0])}, {self.call(name, type_, operands[1:])});"
        if opcode in CONVERSIONS:
            to, of = opcode.split(".")[-2:]
            convert = opcode[: -len(f".{to}.{of}")].replace(".", "_")
            value = f"{convert}<{to}>({self.value(operands[1], of)})"
            return f"set({self.variable(operands[0])}, {value});"
        if opcode in ("mov.b32", "mov.b64"):
            return self.mov_of_halves(f"b{int(type_[1:]) // 2}", type_, *operands)
        if opcode.startswith(("ld.", "st.")):
            return self.access(opcode, operands)
        if opcode == "atom.global.add.u64":
            place = self.place(operands[1], "u64")
            return (
                f"{{ auto* at = global<8, kAtomic>(self, {place}); const u64 old = read<u64>(at); "
                f"write(at, old + {self.value(operands[2], 'u64')}); "
                f"set({self.variable(operands[0])}, old); }}"
            )
        if opcode in ("bra", "bra.uni") and len(operands) == 1:
            return f"goto {label(operands[0])};"
        if (opcode, operands) == ("bar.sync", ["0"]):
            return "barrier(self);"
        if (opcode, operands) == ("bar.warp.sync", ["-1"]):
            return "warp_barrier(self);"
        if (opcode, operands) == ("ret", []):
            return "return;"
        raise Unknown(f"{opcode} {', '.join(operands)}")

    def mov_of_halves(self, half: str, type_: str, to: str, of: str) -> str:
        if to.startswith("{"):
            low, high = split(to[1:-1])
            value = self.value(of, type_)
            shift = type_[1:] + " / 2"
            low, high = self.variable(low), self.variable(high)
            return f"set({low}, {half}({value})); set({high}, {half}({value} >> {shift}));"
        low, high = (self.value(part, half) for part in split(of[1:-1]))
        return f"set({self.variable(to)}, {type_}({low} | {type_}({high}) << {type_[1:]} / 2));"

    def statement(self, text: str) -> None:
        negated, guard, text = re.fullmatch(r"(?:@(!?)(%\w+) )?(.*)", text).groups()
        opcode, _, rest = text.partition(" ")
        line = self.instruction(opcode, split(rest))
        if guard:
            line = f"if ({negated}{self.variable(guard)}) {{ {line} }}"
        self.lines.append(line)
        if guard and opcode.startswith("bra"):
            self.piece()

    def piece(self) -> None:
        self.lines.append(f"covered[{self.pieces}] = 1;")
        self.pieces += 1

    def body(self, text: str, dynamic: list[tuple[str, int]]) -> None:
        text = re.sub(r'\.pragma\s+"(nounroll|used_bytes_mask \d+)"\s*;', "", text)
        pieces = re.findall(r"\s*(?:([$\w]+):|((?:\{[^{}]*\}|[^;{}])+);|(\S+))", text)
        for _, declared, _ in pieces:
            if found := re.fullmatch(r"\.reg\s+\.(\w+)\s+%(\w+)<(\d+)>", declared):
                self.registers |= {f"_{found[2]}{i}": found[1] for i in range(int(found[3]))}
            elif array := shared_array(declared):
                name, align, size = array
                self.symbols[name] = aligned(self.static_shared, align)
                self.static_shared = self.symbols[name] + size
            elif declared.startswith("."):
                raise Unknown(declared)
        for name, align in dynamic:
            self.static_shared = self.symbols[name] = aligned(self.static_shared, align)
        self.piece()
        for label_of_piece, text, unknown in pieces:
            if unknown:
                raise Unknown(unknown)
            if label_of_piece:
                self.lines.append(f"{label(label_of_piece)}:;")
                self.piece()
            elif not text.startswith("."):
                self.statement(" ".join(text.split()))

    def cpp(self, number: int) -> list[str]:
        used = set(re.findall(r"\b_[a-z]+\d+\b", "\n".join(self.lines)))
        declared = [f"  {t} {r} = garbage<{t}>;" for r, t in self.registers.items() if r in used]
        return [
            f"// {self.name}",
            f"static unsigned char covered{number}[{self.pieces}];",
            f"static void kernel{number}(Thread& self) {{",
            f"  auto* const covered = covered{number};",
            *declared,
            *("  " + line for line in self.lines),
            "}",
            f"static const u32 parameters{number}[] = {{{', '.join(map(str, self.parameters))}}};",
        ]

    def entry(self, number: int) -> str:
        return (
            f'{{"{self.name}", kernel{number}, parameters{number}, {len(self.parameters) - 1}, '
            f"{self.static_shared}, {self.most_threads}, covered{number}, {self.pieces}}},"
        )


def label(name: str) -> str:
    return name.replace("$", "")


def aligned(offset: int, align: int) -> int:
    return -(-offset // align) * align


def split(operands: str) -> list[str]:
    """At the commas that are not between braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{}])+", operands)]


def shared_array(text: str) -> tuple[str, int, int] | None:
    """The name, alignment and size of an array; one of unknown size has size 0."""
    found = re.fullmatch(r"(?:\.extern )?\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\]", text)
    return (found[2], int(found[1]), int(found[3] or 0)) if found else None


def signature(text: str) -> Kernel:
    """A kernel from what stands before its body."""
    found = re.fullmatch(r"(?:\.visible )?\.entry (\w+)\s*\((.*)\)(.*)", text, re.DOTALL)
    if not found:
        raise Unknown(text[:100])
    name, parameters, attributes = found.groups()
    most = re.search(r"\.maxntid (\d+)(?:, 1, 1)?\s", attributes + "\n")
    rest = re.sub(r"\.(maxntid|minnctapersm) \d+(, 1, 1)?|\s", "", attributes)
    if rest:
        raise Unknown(f"{rest} of {name}")
    kernel, end = Kernel(name, int(most[1]) if most else 1024), 0
    for parameter in filter(None, map(str.strip, parameters.split(","))):
        struct = re.fullmatch(r"\.param \.align (\d+) \.b8 (\w+)\[(\d+)\]", parameter)
        plain = re.fullmatch(r"\.param \.([usbf])(\d+) (\w+)", parameter)
        if struct:
            align, name, size = int(struct[1]), struct[2], int(struct[3])
        elif plain:
            align, name, size = int(plain[2]) // 8, plain[3], int(plain[2]) // 8
        else:
            raise Unknown(parameter)
        kernel.symbols[name] = aligned(end, align)
        kernel.parameters.append(kernel.symbols[name])
        end = kernel.symbols[name] + size
    kernel.parameters.append(end)
    return kernel


def parse(text: str) -> list[Kernel]:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"\.(version|target|address_size) [^\n]*", "", text)
    kernels, dynamic = [], []
    # A body ends with the only brace that begins a line.
    for outside, body in re.findall(r"(.*?)(?:^\{(.*?)^\}|\Z)", text, re.DOTALL | re.MULTILINE):
        *declarations, head = outside.split(";")
        for declaration in declarations:
            array = shared_array(declaration.strip())
            if array is None:
                raise Unknown(declaration.strip())
            dynamic.append(array[:2])
        if head.strip():
            kernel = signature(head.strip())
            try:
                kernel.body(body, dynamic)
            except Unknown as error:
                raise Unknown(f"{error} in {kernel.name}") from None
            kernels.append(kernel)
    return kernels


def file(kernels: list[Kernel]) -> str:
    lines = ['#include "instructions.h"', "namespace ptx {"]
    for number, kernel in enumerate(kernels):
        lines += kernel.cpp(number)
    lines.append("static const Entry entries[] = {")
    lines += [kernel.entry(number) for number, kernel in enumerate(kernels)]
    lines += ["{}};", "static const Registration registration(entries);", "}  // namespace ptx"]
    return "\n".join(lines) + "\n"


def main() -> None:
    source, out, parts, only = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    try:
        kernels = parse(Path(source).read_text())
    except Unknown as error:
        raise SystemExit(f"{source}: cannot translate {error}: see tests/ptx/README.md") from None
    kernels = [kernel for kernel in kernels if re.search(only, kernel.name)]
    kernels.sort(key=lambda kernel: len(kernel.lines))
    for part in range(parts):
        path, text = Path(f"{out}_{part}.cpp"), file(kernels[part::parts])
        if not path.exists() or path.read_text() != text:  # so that nothing is compiled in vain
            path.write_text(text)


if __name__ == "__main__":
    main()
