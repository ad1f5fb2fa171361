"""How much memory a traced program holds at its worst moment: an estimate, without compiling it.

Follows what is alive from equation to equation, in the order in which they were traced, with the habits of
XLA's own assignment of buffers: a result takes the place of an operand that nobody needs any more, a loop's
state is updated in place, and what fusion never writes to memory (a broadcast, a product that is summed at
once) takes none.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_LOOPS = {"while", "scan"}
_VIEWS = {"reshape", "squeeze", "copy", "sharding_constraint"}
_FUSED = {"broadcast_in_dim", "iota", "convert_element_type"}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"}
_NOT_FUSED = {"dot_general", "conv_general_dilated", "sort", "scatter", "scatter-add", "cumsum", "gather"}


def bytes_of(tree: Any) -> int:
    """Bytes of all leaves, abstract or not."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def leaf_bytes(leaf: Any) -> int:
    """Bytes of one array, abstract or not."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8 * int(np.prod(leaf.shape, dtype=np.int64))
    return int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize


def share_bytes(leaf: Any) -> int:
    """Bytes of one array on each device, if it says how they hold it; else of all of it."""
    if leaf.sharding is None:
        return leaf_bytes(leaf)
    return leaf_bytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))


def peak_bytes(
    program: core.ClosedJaxpr,
    labels: Sequence[str] = (),
    *,
    most: Sequence[str] = (),
    donated: int = 0,
    size: Callable[[Any], int] = leaf_bytes,
) -> Counter[str]:
    """Bytes alive at the worst moment of a traced program, by the part of it that made them.

    Inputs do not count, nor does what takes a donated input's place.

    Args:
      program: traced.
      labels: names given by `jax.named_scope`; what is made under none of them counts under "". Of nested
        ones the innermost counts.
      most: of which of these the moment is the worst; empty: of all together.
      donated: how many of the inputs, from the first, may be overwritten.
      size: bytes of an array on one device, outside of `jax.shard_map`; inside, shapes are a device's own.

    Returns:
      label -> bytes; their sum is the peak.
    """
    walk = _Walk(tuple(labels), tuple(most))
    return walk.peak(program.jaxpr, "", set(program.jaxpr.invars[:donated]), size)


@dataclasses.dataclass(frozen=True)
class _Walk:
    labels: tuple[str, ...]
    most: tuple[str, ...] = ()

    def peak(self, jaxpr: Any, label: str, donated: set, size: Callable[[Any], int]) -> Counter[str]:
        """Of one program. `donated`: inputs whose place results may take."""
        end = len(jaxpr.eqns)
        last = {var: place for place, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
        last |= dict.fromkeys(_variables(jaxpr.outvars), end)
        readers: dict[Any, list[Any]] = {}
        for eqn in jaxpr.eqns:
            for var in _variables(eqn.invars):
                readers.setdefault(var, []).append(eqn)
        held: dict[Any, tuple[str, int]] = dict.fromkeys(donated, (label, 0))
        alive: Counter[str] = Counter()
        worst: Counter[str] = Counter()

        for place, eqn in enumerate(jaxpr.eqns):
            here = self._label(eqn, label)
            dying = [var for var in _variables(eqn.invars) if var in held and last[var] == place]
            inner = self._inner(eqn, here, set(dying), size)
            carried = _carried_by(eqn)
            reusable = {var: held[var] for var in dying if carried is None or var in carried}
            read = [var for var in dying if var not in reusable]
            made: Counter[str] = Counter()
            for var in eqn.outvars:
                cost = 0 if _is_fused(eqn, var, readers, last, end) else size(var.aval)
                source = _reused(eqn, var, reusable, cost, size)
                if source is None:
                    held[var] = here, cost
                    made[here] += cost
                else:
                    held[var] = reusable.pop(source)
                    del held[source]
            # A loop's results are its state, and there all the time; others are written when all is done.
            in_loop = eqn.primitive.name in _LOOPS
            moments = [alive + made + inner] if in_loop else [alive + inner, alive + made]
            worst = max(worst, *moments, key=self._counted)
            alive = alive + made
            for var in [*reusable, *read, *(var for var in eqn.outvars if var not in last)]:
                owner, cost = held.pop(var)
                alive[owner] -= cost
        return worst

    def _counted(self, moment: Counter[str]) -> int:
        return sum(moment[label] for label in self.most) if self.most else sum(moment.values())

    def _label(self, eqn: Any, inherited: str) -> str:
        names = str(eqn.source_info.name_stack).split("/")
        return next((name for name in reversed(names) if name and name in self.labels), inherited)

    def _inner(self, eqn: Any, label: str, dying: set, size: Callable[[Any], int]) -> Counter[str]:
        """The worst of the programs inside: a loop's body, the branches, a called function."""
        own = leaf_bytes if eqn.primitive.name == "shard_map" else size
        worst: Counter[str] = Counter()
        for inside in (inside for value in eqn.params.values() for inside in programs_inside(value)):
            operands = eqn.invars[len(eqn.invars) - len(inside.invars) :]
            if eqn.primitive.name == "scan":
                donated = set(inside.invars[_carried(eqn.params)])
            elif eqn.primitive.name == "while":
                donated = set(inside.invars[len(inside.invars) - len(eqn.outvars) :])
            else:
                pairs = zip(inside.invars, operands, strict=False)
                donated = {
                    var for var, operand in pairs if isinstance(operand, core.Var) and operand in dying
                }
            worst = max(worst, self.peak(inside, label, donated, own), key=self._counted)
        return worst


def _carried_by(eqn: Any) -> set | None:
    """Of a loop, the operands whose places its results may take, as it reads all others to its end.

    None: the equation is no loop, and all that it reads may be overwritten.
    """
    if eqn.primitive.name == "scan":
        return set(_variables(eqn.invars[_carried(eqn.params)]))
    if eqn.primitive.name == "while":
        return set(_variables(eqn.invars[len(eqn.invars) - len(eqn.outvars) :]))
    return None


def _carried(scan: Mapping[str, Any]) -> slice:
    """Which operands of a scan are its carry; a private matter of JAX, which changed after 0.10."""
    if "num_consts" in scan:
        first, count = scan["num_consts"], scan["num_carry"]
    else:
        first, count, _ = (len(list(part)) for part in scan["ft_in"].unpack())
    return slice(first, first + count)


def _variables(items: Sequence[Any]) -> list[Any]:
    return [item for item in items if isinstance(item, core.Var)]


def _reused(eqn: Any, var: Any, reusable: dict, cost: int, size: Callable[[Any], int]) -> Any:
    """An operand that dies here and whose place the result takes; None if there is none."""
    if eqn.primitive.name in _NOT_FUSED and not eqn.primitive.name.startswith("scatter"):
        return None  # which reads its operands while it writes
    wanted = size(var.aval)
    fits = [other for other in reusable if size(other.aval) == wanted]
    if eqn.primitive.name in _VIEWS:
        return fits[0] if fits else None
    return next((other for other in fits if reusable[other][1] <= cost), None) if cost else None


def _is_fused(eqn: Any, var: Any, readers: dict, last: dict, end: int) -> bool:
    """Whether a value is never written to memory."""
    own, name = readers.get(var, []), eqn.primitive.name
    if name in _VIEWS:
        return True
    if last.get(var) == end or any(_has_programs(reader) for reader in own):
        return False
    if name in _FUSED:
        return True
    if name in _NOT_FUSED or _has_programs(eqn):
        return False
    return len(own) == 1 and own[0].primitive.name in _REDUCTIONS


def _has_programs(eqn: Any) -> bool:
    return any(programs_inside(value) for value in eqn.params.values())


def programs_inside(value: Any) -> Sequence[Any]:
    """The programs that a parameter of an equation is made of: a loop's body, a conditional's branches."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [inside for item in value for inside in programs_inside(item)]
    return []
