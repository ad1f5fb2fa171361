"""Reads a compiled program's text (XLA's HLO): exchanges between devices, traffic, tiles, estimated cycles.

`Compiled.cost_analysis()` counts a loop's body once, and says nothing of exchanges. Here each instruction
counts as often as its loops run. What is read is XLA's own text; nothing of it is a promise, so that a part
that a later release writes otherwise is left out rather than guessed.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import jax

from fedjax_sim.engine.program_files import OF_ONE

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_NO_TRAFFIC = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "iota",
    "while",
    "conditional",
}
_NO_TRAFFIC |= {"call", "after-all", "partition-id", "replica-id"}
_PICKS = {"gather", "dynamic-slice", "slice"}
_DONE, _START = "-done", "-start"


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result.

    Attributes:
      dtype: as HLO writes it, such as f32.
      shape: its dimensions.
      order: dimensions from the innermost to the outermost; empty: the last is the innermost.
      tile: of the innermost dimensions, that of the innermost last; empty: none.
      space: the memory that it lies in; 0 is the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return self._bytes(math.prod(self.shape))

    @property
    def padded(self) -> int:
        """Bytes that it takes, in whole tiles."""
        if not self.tile or not self.shape:
            return self.size
        inner_first = [self.shape[axis] for axis in self.order] or list(reversed(self.shape))
        for place, tile in enumerate(reversed(self.tile)):
            if place < len(inner_first):
                inner_first[place] = -(-inner_first[place] // tile) * tile
        return self._bytes(math.prod(inner_first))

    def _bytes(self, numbers: int) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits[0]) if digits else 32
        return -(-numbers * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      op: what it does, such as fusion.
      arrays: its result; of a tuple all of them.
      operands: names of the instructions that it reads.
      rest: the line after the operands.
      is_root: whether it is its computation's result.
    """

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program, scopes from the outermost."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """XLA's estimate; None where it has none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    def called(self, *roles: str) -> list[str]:
        """Names of the computations that it calls as `body`, `calls` and the like."""
        names = []
        for role in roles:
            for one in re.findall(rf"\b{role}=(%[\w.\-]+|\{{[^}}]*\}})", self.rest):
                names += re.findall(r"%([\w.\-]+)", one)
        return names


@dataclasses.dataclass(frozen=True)
class Frame:
    """A place in a source file, of a call that was active when an instruction was traced."""

    file: str
    line: int
    function: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      op: such as all-to-all, or all-to-all between slices.
      bytes: of its result on one device.
      times: how often it runs.
      stack: the calls that asked for it, the innermost first.
    """

    op: str
    bytes: int
    times: float
    stack: tuple[Frame, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A compiled program, of one device.

    Attributes:
      entry: name of the computation that it begins with.
      computations: name -> its instructions by their names, in their order.
      frames: number -> (frame, number of its caller).
    """

    entry: str
    computations: Mapping[str, Mapping[str, Instruction]]
    frames: Mapping[int, tuple[Frame, int]]

    def executed(self, lengths: Mapping[str, float]) -> Iterator[tuple[Instruction, float]]:
        """All instructions that are started one by one, and how often; not those inside of a fusion.

        Of a conditional all branches count.

        Args:
          lengths: how often loops run whose length XLA does not know, by the end of their `op_name`.
        """
        return ((one, times) for one, _, times in self._walk(self.entry, 1.0, lengths))

    def _walk(
        self, name: str, times: float, lengths: Mapping[str, float]
    ) -> Iterator[tuple[Instruction, Mapping[str, Instruction], float]]:
        """(instruction, those beside it by their names, how often)."""
        body = self.computations.get(name, {})
        for one in body.values():
            yield one, body, times
            inner = times * (self.length(one, lengths) or 1.0) if one.op == "while" else times
            roles = {
                "while": ("body",),
                "conditional": ("branch_computations", "true_computation", "false_computation"),
                "call": ("to_apply",),
                "async-start": ("calls",),
            }
            for callee in one.called(*roles.get(one.op, ())):
                yield from self._walk(callee, inner, lengths)

    def length(self, loop: Instruction, lengths: Mapping[str, float]) -> float | None:
        """How often a loop's body runs; None where nobody knows."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if found:
            return float(found[1])
        for end, length in lengths.items():
            if loop.op_name.endswith(end):
                return length
        for condition in loop.called("condition"):
            bound = self._bound(condition)
            if bound is not None:
                return float(bound)
        return None

    def _bound(self, condition: str) -> int | None:
        """The constant that a loop's counter is compared with."""
        body = self.computations.get(condition, {}).values()
        constants = {}
        for one in body:
            if one.op == "constant":
                value = re.match(r"(\d+)\)", one.rest)
                if value:
                    constants[one.name] = int(value[1])
        root = next((one for one in body if one.is_root), None)
        if root is None or root.op not in ("compare", "fusion") or "direction=" not in self._comparison(root):
            return None
        bounds = [constants[name] for name in root.operands if name in constants]
        return bounds[0] if len(bounds) == 1 else None

    def _comparison(self, root: Instruction) -> str:
        if root.op == "compare":
            return root.rest
        return "".join(one.rest for one in self._fused(root) if one.op == "compare")

    def _fused(self, one: Instruction) -> list[Instruction]:
        """What is inside of a fusion; of another instruction nothing."""
        called = one.called("calls") if one.op == "fusion" else ()
        return [inside for name in called for inside in self.computations.get(name, {}).values()]

    def unknown_loops(self, lengths: Mapping[str, float]) -> int:
        """How many loops count once because nobody knows how often they run."""
        loops = (one for one, _ in self.executed(lengths) if one.op == "while")
        return sum(self.length(one, lengths) is None for one in loops)

    def collectives(self, lengths: Mapping[str, float]) -> list[Collective]:
        """Every exchange, those inside of fusions too, the largest first; without sums over one device.

        Between slices of TPUs the hosts make it, and XLA writes what a chip hands to its own.
        """
        found = []
        for one, body, times in self._walk(self.entry, 1.0, lengths):
            between = (
                re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest) if one.op == "send" else None
            )
            if between:
                op = f"{between[1].lower().replace('_', '-')} between slices"
                given = next((body[name] for name in one.operands if name in body), one)
                found.append(Collective(op, one.arrays[0].size, times, self.stack(given)))
            for part in (one, *self._fused(one)):
                kind = part.op.removesuffix(_START)
                if kind in _COLLECTIVES and part.arrays and not OF_ONE.search(part.rest):
                    sizes = [array.size for array in part.arrays]
                    # What is only started returns its operands too, but for sums.
                    size = max(sizes) if part.op.endswith(_START) and kind != "all-reduce" else sum(sizes)
                    found.append(Collective(kind, size, times, self.stack(part)))
        return sorted(found, key=lambda one: -one.bytes)

    def stack(self, one: Instruction) -> tuple[Frame, ...]:
        """The calls that were active when it was traced, the innermost first."""
        found = re.search(r"stack_frame_id=(\d+)", one.rest)
        number, frames = int(found[1]) if found else 0, []
        while number in self.frames:
            frame, caller = self.frames[number]
            frames.append(frame)
            if caller == number:
                break
            number = caller
        return tuple(frames)

    def cycles(self, lengths: Mapping[str, float]) -> float | None:
        """XLA's estimate for the whole program, exchanges left out; None where XLA has none."""
        parts = [one.cycles * times for one, times in self.executed(lengths) if one.cycles is not None]
        return sum(parts) if parts else None

    def traffic(self, lengths: Mapping[str, float]) -> float:
        """Bytes read from the device's main memory and written to it, in whole tiles."""
        return sum(
            times * self._moved(one, body) for one, body, times in self._walk(self.entry, 1.0, lengths)
        )

    def padding(self, lengths: Mapping[str, float]) -> float:
        """Of the bytes that results take, the share that only fills up tiles."""
        used = taken = 0.0
        for one, times in self.executed(lengths):
            if one.op in _NO_TRAFFIC or one.op.endswith((_DONE, _START)):
                continue
            used += times * sum(array.size for array in one.arrays)
            taken += times * sum(array.padded for array in one.arrays)
        return 1 - used / taken if taken else 0.0

    def _moved(self, one: Instruction, body: Mapping[str, Instruction]) -> int:
        if one.op in _NO_TRAFFIC or one.op.endswith(_DONE):
            return 0
        operands = [(place, body[name]) for place, name in enumerate(one.operands) if name in body]
        read = sum(self._read(one, place, operand) for place, operand in operands)
        written = one.arrays[:1] if one.op.endswith(_START) else one.arrays
        return read + sum(array.padded for array in written if not array.space)

    def _read(self, reader: Instruction, place: int, operand: Instruction) -> int:
        """Bytes of an operand that are read: of one from which a fusion only picks, what it picks."""
        whole = sum(array.padded for array in operand.arrays if not array.space)
        if not whole:
            return 0
        if reader.op in _PICKS and place == 0:
            return min(whole, sum(array.padded for array in reader.arrays))
        if reader.op != "fusion":
            return whole
        inside = self._fused(reader)
        parameter = next(
            (one for one in inside if one.op == "parameter" and one.rest.startswith(f"{place})")), None
        )
        if parameter is None:
            return whole
        users = [one for one in inside if parameter.name in one.operands]
        if users and all(one.op in _PICKS and one.operands[0] == parameter.name for one in users):
            return min(whole, sum(array.padded for one in users for array in one.arrays))
        return whole


@contextlib.contextmanager
def with_lines() -> Iterator[None]:
    """What is lowered here carries the lines of source that it comes from, whatever JAX is set to."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 20)
    try:
        yield
    finally:
        jax.config.update(name, before)


def read(text: str) -> Module:
    """The module of `Compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, name, body = "", None, []
    for line in text.splitlines():
        if name is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                name, body = head[2], []
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            computations[name], name = {one.name: one for one in body}, None
        else:
            made = _instruction(line)
            if made is not None:
                body.append(made)
    return Module(entry, computations, _frames(text))


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    op = re.match(r"([\w\-]+)\(", rest)
    if op is None:
        return None
    inside = rest[op.end() - 1 :]
    end = _closing(inside)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside[:end]))
    # A constant's value and a parameter's number stand where others have operands.
    rest = inside[1:] if op[1] in ("constant", "parameter") else inside[end:]
    return Instruction(head[2], op[1], tuple(_arrays(kind)), operands, rest, bool(head[1]))


def _closing(text: str) -> int:
    """Where the parenthesis ends that a text begins with."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    return len(text)


def _arrays(kind: str) -> Iterator[Array]:
    for dtype, shape, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", kind):
        order, _, tiles = layout.strip("{}").partition(":")
        tile = re.search(r"T\(([\d,]+)\)", tiles)
        space = re.search(r"S\((\d+)\)", tiles)
        yield Array(
            dtype,
            _numbers(shape),
            _numbers(order),
            _numbers(tile[1]) if tile else (),
            int(space[1]) if space else 0,
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part.lstrip("<=")) for part in text.split(",") if part)


def _frames(text: str) -> dict[int, tuple[Frame, int]]:
    """The tables of calls at the head of a module."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] | None = None
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line, {})
        elif current is not None:
            entry = re.match(r"(\d+) (.*)", line)
            if entry:
                current[int(entry[1])] = entry[2]
            elif line.strip():
                break  # the first computation
    number = lambda text, key: int(re.search(rf"{key}=(\d+)", text)[1])  # noqa: E731 # pyright: ignore
    places = {}
    for key, line in tables.get("FileLocations", {}).items():
        file = tables.get("FileNames", {}).get(number(line, "file_name_id"), "").strip('"')
        function = tables.get("FunctionNames", {}).get(number(line, "function_name_id"), "").strip('"')
        places[key] = Frame(file, number(line, "line"), function)
    rows = tables.get("StackFrames", {})
    callers = {key: number(line, "parent_frame_id") if "parent_" in line else 0 for key, line in rows.items()}
    # XLA prints a caller's number plus one: a frame without a caller has 1.
    shift = 0 if 0 in callers.values() else 1
    found = {}
    for key, line in rows.items():
        place = places.get(number(line, "file_location_id"))
        if place is not None:
            found[key] = place, callers[key] - shift
    return found
