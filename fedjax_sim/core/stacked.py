"""Operations on stacked pytrees: every leaf has a leading axis, the client slot, called K here.

Reductions over the slot axis are written as contractions: as multiply-then-sum XLA's CPU backend takes up
to a hundred times longer on some versions.

What a mean over clients does with a leaf that is no float, such as a layer's count of batches or a flag: the
result is the largest value among the clients that count (those included, with a weight above 0), and keeps
its dtype. OUR CHOICE: it is exact in any dtype and the same in any layout; a counter goes on from the client
that is furthest, and a flag is set once it is for anyone. Floats are averaged in float32, wider ones in their
own dtype, and keep their dtype too. Whatever averages models does it by `mean`, or by its parts `nothing`,
`weighted_sum`, `add`, `over_devices` and `divided`; arithmetic beyond a mean asks `averages` first.
"""

# ruff: noqa: F722 - shapes in annotations, such as "K ...", are no expressions of Python

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32, PyTree, Shaped

AXIS = "clients"
"""Name of the mesh axis over which slots are sharded."""

RUNS = "runs"
"""Name of the mesh axis over which runs are sharded that are one program (`fedjax_sim.engine.together`)."""

SIDE = "side"
"""Name of the axis of `jax.vmap` along which such runs lie side by side on a device."""

_FULL = jax.lax.Precision.HIGHEST
"""Of products; accelerators may otherwise round factors, to 8 bits (TPUs) or 11 (GPUs) of a float32's 24."""

Leaf = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
"""What has a shape and a dtype."""


def broadcast(tree: PyTree, count: int) -> PyTree[Shaped[Array, "{count} ..."]]:
    """One model -> [count, …], every slot the same."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), tree)


def averages(leaf: Leaf) -> bool:
    """Whether numbers of this leaf's dtype can be averaged, or added to: floats and complex ones."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def weighted_sum(tree: PyTree[Shaped[Array, "K ..."]], weights: Float32[Array, " K"]) -> PyTree:
    """Sum over slots of weights[k] * leaf[k]. [K, …] leaves, f32[K] -> […] leaves, float32 or wider.

    Of a leaf that is no float: the largest value in slots whose weight is not 0, see above; the least that
    its dtype has if there are none.
    """

    def one(leaf: jax.Array) -> jax.Array:
        if not averages(leaf):
            return jnp.where(_column(weights != 0, leaf), leaf, _least(leaf.dtype)).max(0)
        leaf, factors = leaf.astype(_wide(leaf.dtype)), weights.astype(_wide(leaf.dtype))
        # Of one slot, a product that fuses with what is around it.
        if len(factors) == 1:
            return factors[0] * leaf[0]
        return jnp.tensordot(factors, leaf, axes=1, precision=_FULL)

    return jax.tree.map(one, tree)


def nothing(tree: PyTree) -> PyTree:
    """The `weighted_sum` of no slots, for models like `tree`. […] -> […]."""

    def one(leaf: Leaf) -> jax.Array:
        return jnp.zeros(leaf.shape, _wide(leaf.dtype)) if averages(leaf) else _least(leaf.dtype, leaf.shape)

    return jax.tree.map(one, tree)


def add(total: PyTree, part: PyTree) -> PyTree:
    """Two `weighted_sum`s as one."""
    return jax.tree.map(lambda a, b: a + b if averages(a) else jnp.maximum(a, b), total, part)


def over_devices(total: PyTree, weight: Float[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
    """Every device's `weighted_sum` and sum of weights f32[] -> those of all devices; inside `shard_map`."""
    leaves, structure = jax.tree.flatten(total)
    floats, weight = summed(([leaf for leaf in leaves if averages(leaf)], weight))
    sums = iter(floats)

    def largest(leaf: jax.Array) -> jax.Array:
        # That it waits for the weight keeps the two exchanges in one order on all devices.
        leaf = jnp.where(weight > 0, leaf, _least(leaf.dtype))
        return jax.lax.pmax(leaf, AXIS) if _on_many() else leaf

    leaves = [next(sums) if averages(leaf) else largest(leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, leaves), weight


def divided(total: PyTree, weight: Float[Array, ""], like: PyTree) -> PyTree:
    """The mean, of a `weighted_sum` and the sum of its weights f32[]; dtypes as in `like`."""

    def one(leaf: jax.Array, like: Leaf) -> jax.Array:
        return (leaf / weight.astype(leaf.dtype)).astype(like.dtype) if averages(leaf) else leaf

    return jax.tree.map(one, total, like)


def mean(tree: PyTree[Shaped[Array, "K ..."]], weights: Float32[Array, " K"] | None = None) -> PyTree:
    """Mean over slots. [K, …], f32[K] that add up to 1 (None: uniform) -> […], dtypes as they are."""
    if weights is None:
        count = jax.tree.leaves(tree)[0].shape[0]
        weights = jnp.full((count,), 1.0 / count, jnp.float32)
    return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), weighted_sum(tree, weights), tree)


def where_slot(
    flags: Bool[Array, " K"], yes: PyTree[Shaped[Array, "K ..."]], no: PyTree[Shaped[Array, "K ..."]]
) -> PyTree[Shaped[Array, "K ..."]]:
    """Slot by slot: yes[k] where flags[k], else no[k]. bool[K], [K, …], [K, …] -> [K, …]."""
    return jax.tree.map(lambda a, b: jnp.where(_column(flags, a), a, b), yes, no)


def permute(leaf: Shaped[Array, " K *rest"], index: Int32[Array, " m"]) -> Shaped[Array, " m *rest"]:
    """leaf[index] along the slot axis: out[k] = leaf[index[k]]. [K, …], i32[m] -> [m, …].

    An index beyond the last slot reads the last. See `permute_each`.
    """
    return permute_each([leaf], [index])[0]


def permute_each(
    leaves: Sequence[Shaped[Array, "K ..."]], indices: Sequence[Int32[Array, " m"]]
) -> list[Shaped[Array, "m ..."]]:
    """Leaves permuted along the slot axis, each by an index of its own. [K, …], i32[m] -> [m, …] each.

    Sharded over the mesh axis `clients`, a gather with an unknown index would bring all slots to every
    device. So the sharding moves instead: from the slot axis to the parameters and back, two all-to-alls for
    as many leaves as fit into `_width` numbers a device, as their number is what XLA compiles long and a
    round waits for. Memory a device stays what its share is. Slots and parameters that the devices do not
    divide are filled up with zeros on the way. With m = K a leaf that is larger goes strip by strip, each
    written where it was read, so that a donated leaf needs no second copy of itself.
    """
    devices, count, wanted = _devices(), leaves[0].shape[0], indices[0].shape[0]
    if devices == 1:
        plain = lambda leaf, index: jnp.take(leaf, index, axis=0, mode="clip")  # noqa: E731
        move = partial(_in_strips, devices=1) if count == wanted else plain
        return [move(leaf, index) for leaf, index in zip(leaves, indices, strict=True)]
    given, leaves = list(leaves), _raw(list(leaves))
    places, width = _multiple(wanted, devices), _width() // _multiple(count, devices) * devices
    spare = jnp.arange(wanted, places, dtype=jnp.int32)  # whose slots nobody reads
    indices = [jnp.concatenate([jnp.minimum(index, count - 1), spare]) for index in indices]
    filled = [filled_up(leaf, devices) for leaf in leaves]
    groups: dict[Any, list[list[int]]] = {}  # of leaves that travel together, by dtype
    room: dict[Any, int] = {}
    for place, leaf in enumerate(leaves):
        size = _multiple(leaf[0].size, devices)
        if room.get(leaf.dtype, 0) < size:
            groups.setdefault(leaf.dtype, []).append([])
            room[leaf.dtype] = width
        groups[leaf.dtype][-1].append(place)
        room[leaf.dtype] -= size

    def run(leaves: list[jax.Array], indices: list[jax.Array]) -> list[jax.Array]:
        out = list(leaves)
        for group in (group for alike in groups.values() for group in alike):
            own, theirs = [leaves[place] for place in group], [indices[place] for place in group]
            if len(own) == 1 and own[0].size > _width() and count == wanted:
                moved = [_in_strips(own[0], theirs[0], devices)]
            else:
                moved = _exchanged(own, theirs, devices)
            for place, leaf in zip(group, moved, strict=True):
                out[place] = leaf
        return out

    moved = _on_own_slots(run, devices)(filled, indices)
    return _like(given, [cut_to(leaf, wanted) for leaf in moved])


def _exchanged(leaves: list[jax.Array], indices: list[jax.Array], devices: int) -> list[jax.Array]:
    """Of one device's slots: leaves [K / D, …] by indices i32[m] -> [m / D, …]; inside `shard_map`."""
    own = leaves[0].shape[0]
    widths = [-(-leaf[0].size // devices) for leaf in leaves]
    flat = [
        _wide_enough(leaf.reshape(own, -1), width * devices).reshape(own, devices, width)
        for leaf, width in zip(leaves, widths, strict=True)
    ]
    # [K, 1, columns]: all slots of a share of every leaf's parameters.
    moved = jax.lax.all_to_all(jnp.concatenate(flat, 2), AXIS, split_axis=1, concat_axis=0, tiled=True)
    parts = jnp.split(moved, np.cumsum(widths)[:-1], axis=2)
    taken = [jnp.take(part, index, axis=0, mode="clip") for part, index in zip(parts, indices, strict=True)]
    back = jax.lax.all_to_all(jnp.concatenate(taken, 2), AXIS, split_axis=0, concat_axis=1, tiled=True)
    return [
        part.reshape(len(part), -1)[:, : leaf[0].size].reshape(len(part), *leaf.shape[1:])
        for part, leaf in zip(jnp.split(back, np.cumsum(widths)[:-1], axis=2), leaves, strict=True)
    ]


def _in_strips(
    leaf: Shaped[Array, " k *rest"], index: Int32[Array, " K"], devices: int
) -> Shaped[Array, " k *rest"]:
    """leaf[index] in strips of columns, in place; of all slots, or of K / D of them inside `shard_map`."""
    own, size = leaf.shape[0], leaf[0].size
    strip = min(max(_width() // (own * devices), 1) * devices, _multiple(size, devices))

    def move(number: jax.Array | int, flat: jax.Array) -> jax.Array:
        # The last strip of several reaches back over moved columns.
        first = jnp.minimum(number * strip, max(size - strip, 0))
        columns = jax.lax.dynamic_slice_in_dim(flat, first, strip, axis=1)
        fresh = first + jnp.arange(strip, dtype=jnp.int32) >= number * strip
        moved = columns
        if devices > 1:
            moved = jax.lax.all_to_all(moved, AXIS, split_axis=1, concat_axis=0, tiled=True)
        moved = jnp.take(moved, index, axis=0, mode="clip")
        if devices > 1:
            moved = jax.lax.all_to_all(moved, AXIS, split_axis=0, concat_axis=1, tiled=True)
        columns = jnp.where(fresh[None], moved, columns)
        return jax.lax.dynamic_update_slice_in_dim(flat, columns, first, axis=1)

    flat, strips = leaf.reshape(own, size), -(-size // strip)
    if strips == 1:
        return move(0, _wide_enough(flat, strip))[:, :size].reshape(leaf.shape)
    return jax.lax.fori_loop(0, strips, move, flat).reshape(leaf.shape)


_STRIP, _WIDE_STRIP = 2**18, 2**24


def _width() -> int:
    """Numbers of all slots together that a device moves at once: what a CPU's cache holds; an accelerator."""
    return _STRIP if platform() == "cpu" else _WIDE_STRIP


def overwrite(
    tree: PyTree[Shaped[Array, "K ..."]], row: PyTree, when: Bool[Array, ""]
) -> PyTree[Shaped[Array, "K ..."]]:
    """Every slot becomes `row` where `when`, written in place. [K, …], […], bool[] -> [K, …]."""
    devices, count = _devices(), jax.tree.leaves(tree)[0].shape[0]

    def run(tree: PyTree, row: PyTree, when: jax.Array) -> PyTree:
        def write(slot: jax.Array, tree: PyTree) -> PyTree:
            return jax.tree.map(
                lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, slot, 0), tree, row
            )

        return jax.lax.fori_loop(0, jnp.where(when, -(-count // devices), 0), write, tree)

    filled = jax.tree.map(lambda leaf: filled_up(leaf, devices), tree)
    written = _on_own_slots(run, devices)(filled, row, when)
    return jax.tree.map(lambda leaf: cut_to(leaf, count), written)


def filled_up(leaf: Shaped[Array, " n *rest"], devices: int) -> Shaped[Array, " m *rest"]:
    """With rows of zeros, so that the devices divide them, and each has its share. [n, …] -> [m, …].

    What `cut_to` undoes: XLA cuts n rows over the devices as it would m, and nothing moves.
    """
    rows = -leaf.shape[0] % devices
    if not rows:
        return leaf
    leaf = jnp.pad(leaf, ((0, rows), *((0, 0) for _ in leaf.shape[1:])))
    return jax.lax.with_sharding_constraint(leaf, P(AXIS))


def cut_to(leaf: Shaped[Array, " m *rest"], count: int) -> Shaped[Array, " n *rest"]:
    """The first `count` rows, of which each device keeps what it has. [m, …] -> [n, …]."""
    if leaf.shape[0] == count:
        return leaf
    return jax.lax.with_sharding_constraint(leaf[:count], P(AXIS))


def whole(tree: PyTree) -> PyTree:
    """Arrays of any shape, whole on every device."""
    if _on_many() or jax.sharding.get_abstract_mesh().empty:  # as they are
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), tree)


def _on_own_slots(run: Callable[..., PyTree], devices: int) -> Callable[..., PyTree]:
    """`run` on every device's own slots of its first argument; the others are whole everywhere."""
    if devices == 1:
        return run

    def call(slots: PyTree, *others: PyTree) -> PyTree:
        specs = (P(AXIS), *(P() for _ in others))
        return jax.shard_map(run, in_specs=specs, out_specs=P(AXIS), check_vma=False)(slots, *others)

    return call


@struct.dataclass
class RowsOf:
    """A stack over all N of which some clients' rows alone are here.

    It stands in the place of a leaf, for `take_rows` and `put_rows` of these clients.

    Attributes:
      ids: i32[K], the clients.
      rows: [K, …], theirs.
    """

    ids: jax.Array
    rows: jax.Array


def rows_of(tree: PyTree[Shaped[Array, "K ..."]], ids: Int32[Array, " K"]) -> PyTree:
    """A tree with `RowsOf` in the place of each leaf [K, …]."""
    return jax.tree.map(lambda leaf: RowsOf(ids, leaf), tree)


def only_rows(tree: PyTree) -> PyTree:
    """What `rows_of` was given: of each `RowsOf` its rows."""
    return jax.tree.map(lambda leaf: leaf.rows if _is_some(leaf) else leaf, tree, is_leaf=_is_some)


def _is_some(leaf: Any) -> bool:
    return isinstance(leaf, RowsOf)


def _held(tree: PyTree) -> jax.Array | None:
    """The clients i32[K] of a tree of `RowsOf`; None of any other."""
    return next((leaf.ids for leaf in jax.tree.leaves(tree, is_leaf=_is_some) if _is_some(leaf)), None)


def _places(held: jax.Array, ids: jax.Array) -> jax.Array:
    """Where each of `ids`, i32[m], is among those that are held, i32[K]. -> i32[m]."""
    order = jnp.argsort(held)
    return order[jnp.searchsorted(held, ids, sorter=order)].astype(jnp.int32)


def take_rows(
    tree: PyTree[Shaped[Array, "N ..."]], ids: Int32[Array, " K"]
) -> PyTree[Shaped[Array, "K ..."]]:
    """Some clients' rows of a stack over all N: tree[ids]. [N, …], i32[K] -> [K, …]; leaves of any dtype.

    Where the stack is sharded, a request for K/D rows travels round the ring of devices and each fills in
    what it holds: memory a device stays its share of both, traffic is that of K rows. An N or K that D does
    not divide is filled up.
    """
    devices, held = _devices(), _held(tree)
    if held is not None:
        rows = only_rows(tree)
        return rows if held is ids else take_rows(rows, _places(held, ids))
    if devices == 1 or not jax.tree.leaves(tree):
        return jax.tree.map(lambda leaf: leaf[ids], tree)
    wanted = ids.shape[0]
    share = -(-wanted // devices)

    def owned(leaf: jax.Array, own_ids: jax.Array, rows: jax.Array) -> jax.Array:
        """`rows`, with those filled in that this device holds."""
        local = own_ids - jax.lax.axis_index(AXIS) * leaf.shape[0]
        mine = (local >= 0) & (local < leaf.shape[0])
        return where_slot(mine, jnp.take(leaf, local, axis=0, mode="clip"), rows)

    def ring(tree: PyTree, ids: jax.Array) -> PyTree:
        def hop(number: jax.Array, rows: PyTree) -> PyTree:
            home = (jax.lax.axis_index(AXIS) - number) % devices
            chunk = jax.lax.dynamic_slice_in_dim(ids, home * share, share)
            rows = jax.tree.map(lambda leaf, part: owned(leaf, chunk, part), tree, rows)
            return jax.lax.ppermute(rows, AXIS, _around(devices))

        empty = jax.tree.map(lambda x: jnp.zeros((share, *x.shape[1:]), x.dtype), tree)
        return jax.lax.fori_loop(0, devices, hop, empty)

    filled = jax.tree.map(lambda leaf: filled_up(leaf, devices), _raw(tree))
    rows = _on_own_slots(ring, devices)(filled, jnp.pad(ids, (0, share * devices - wanted)))
    return _like(tree, jax.tree.map(lambda leaf: cut_to(leaf, wanted), rows))


def put_rows(
    tree: PyTree[Shaped[Array, "N ..."]], ids: Int32[Array, " K"], rows: PyTree[Shaped[Array, "K ..."]]
) -> PyTree[Shaped[Array, "N ..."]]:
    """The stack over all N with some clients' rows replaced. [N, …], i32[K] distinct, [K, …] -> [N, …].

    Leaves of any dtype, the same in both. Sharded, the rows travel round the ring as in `take_rows`.
    """
    devices, held = _devices(), _held(tree)
    if held is not None:
        new = rows if held is ids else put_rows(only_rows(tree), _places(held, ids), rows)
        return rows_of(new, held)
    if devices == 1 or not jax.tree.leaves(tree):
        return jax.tree.map(lambda leaf, new: leaf.at[ids].set(new), tree, rows)
    count, given = jax.tree.leaves(tree)[0].shape[0], ids.shape[0]
    share = -(-given // devices)

    def ring(stacks: tuple[PyTree, PyTree], ids: jax.Array) -> PyTree:
        def hop(number: jax.Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            tree, rows = carry
            home = (jax.lax.axis_index(AXIS) - number) % devices
            chunk = jax.lax.dynamic_slice_in_dim(ids, home * share, share)

            def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
                local = chunk - jax.lax.axis_index(AXIS) * leaf.shape[0]
                # A negative index would count from the end.
                beyond = jnp.where(local < 0, leaf.shape[0], local)
                return leaf.at[beyond].set(new, mode="drop")

            return jax.tree.map(put, tree, rows), jax.lax.ppermute(rows, AXIS, _around(devices))

        return jax.lax.fori_loop(0, devices, hop, stacks)[0]

    nobody = _multiple(count, devices)  # beyond the last device's last row
    # Where the rows were made of the stack's own, XLA else keeps a copy of the stack to write into.
    filled = jax.lax.optimization_barrier((_raw(tree), _raw(rows)))
    filled = jax.tree.map(lambda leaf: filled_up(leaf, devices), filled)
    ids = jnp.pad(ids, (0, share * devices - given), constant_values=nobody)
    written = _on_own_slots(ring, devices)(filled, ids)
    return _like(tree, jax.tree.map(lambda leaf: cut_to(leaf, count), written))


def once_there(index: Int32[Array, " m"], stacks: PyTree, whole: PyTree = ()) -> Int32[Array, " m"]:
    """The same numbers, from 0 up, which a device has only once it has all the rest. i32[m] -> i32[m].

    An exchange that reads them follows those that the rest was made by, on every device. XLA's CPU backend
    starts exchanges in one order on all devices, but goes on while a loop of them is still under way, such as
    the ring of `take_rows`: what does not depend on that loop then meets it in different orders on different
    devices, and these wait for each other for ever. It also drops `jax.lax.optimization_barrier` before that.

    Args:
      index: whole on every device.
      stacks: leaves [n, …], of which each device has its share.
      whole: leaves that are whole on every device.
    """
    devices = _devices()
    if devices == 1:
        return index

    def run(stacks: PyTree, index: jax.Array, whole: PyTree) -> jax.Array:
        for leaf in jax.tree.leaves((stacks, whole)):
            if leaf.size:  # 0 or -1, which XLA does not know
                index = jnp.maximum(index, -leaf[(0,) * leaf.ndim].astype(bool).astype(jnp.int32))
        return index

    filled = jax.tree.map(lambda leaf: filled_up(leaf, devices), _raw(stacks))
    return jax.shard_map(run, in_specs=(P(AXIS), P(), P()), out_specs=P(), check_vma=False)(
        filled, index, _raw(whole)
    )


def of_pairs(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    stack: Shaped[Array, " N *rest"],
    slots: Shaped[Array, " K *rest"],
) -> Shaped[Array, "N K"]:
    """What a function says of each row of a stack and each of some slots. [N, …], [K, …] -> [N, K].

    Sharded, the slots travel round the ring of devices, each of which has its rows of the result: memory a
    device stays its share, traffic is that of K slots. An N or K that D does not divide is filled up.

    Args:
      function: of one slot […] and some rows [n, …], -> [n].
      stack: rows.
      slots: of the same shape.
    """
    devices, count, given = _devices(), stack.shape[0], slots.shape[0]

    def of_each(stack: jax.Array, slots: jax.Array) -> jax.Array:
        return jax.lax.map(lambda one: function(one, stack), slots).T

    if devices == 1:
        return of_each(stack, slots)
    share = _multiple(given, devices) // devices

    def ring(both: tuple[jax.Array, jax.Array]) -> jax.Array:
        def hop(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            out, slots = carry
            home = (jax.lax.axis_index(AXIS) - number) % devices
            out = jax.lax.dynamic_update_slice_in_dim(out, of_each(both[0], slots), home * share, 1)
            return out, jax.lax.ppermute(slots, AXIS, _around(devices))

        one = jax.eval_shape(of_each, *both)
        return jax.lax.fori_loop(
            0, devices, hop, (jnp.zeros((one.shape[0], share * devices), one.dtype), both[1])
        )[0]

    found = _on_own_slots(ring, devices)((filled_up(stack, devices), filled_up(slots, devices)))
    return cut_to(found, count)[:, :given]


def summed(tree: PyTree) -> PyTree:
    """What all devices have, added up, inside what `on_devices` runs on each of them."""
    return jax.lax.psum(tree, AXIS) if _on_many() else tree


def on_devices(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` without its check of replication; without jit, on one device, the function itself.

    Args:
      function: of the shares that one device has; the function itself also inside of another such, where a
        device has a whole run.
      mesh: the devices, its axis is `AXIS`.
      in_specs: of each argument, whether it is cut along the axis or whole on each device.
      out_specs: likewise of the results.
    """
    if (_eager() and mesh.size == 1) or _on_many():
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def most_of_runs(number: Int32[Array, ""]) -> Int32[Array, ""]:
    """The largest number that runs side by side have here, one for all of them; of a run alone its own.

    A loop of so many steps, or a branch by it, stays one, where by each run's own number `jax.vmap` would
    compute both sides and select. For work that does no harm where it is done once more than needed.
    """
    return jax.lax.pmax(number, SIDE) if side_by_side() else number


def any_of_runs(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether a flag is set in any of the runs side by side; see `most_of_runs`."""
    return jax.lax.pmax(flag.astype(jnp.int32), SIDE) > 0 if side_by_side() else flag


def all_of_runs(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether a flag is set in all of the runs side by side; see `most_of_runs`."""
    return jax.lax.pmin(flag.astype(jnp.int32), SIDE) > 0 if side_by_side() else flag


def side_by_side() -> bool:
    """Whether this is traced for several runs side by side."""
    try:
        jax.lax.axis_size(SIDE)
    except NameError:
        return False
    return True


def per_slot(function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
    """`jax.vmap` over the slot axis; without jit one slot after another, whose values can be looked at.

    Args:
      function: of one slot.
      in_axes: 0 or None for each argument, or 0 for all of them.
    """
    if not _eager():
        return jax.vmap(function, in_axes=in_axes)

    def call(*args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        pairs = list(zip(args, axes, strict=True))
        count = next(leaf.shape[0] for arg, axis in pairs if axis == 0 for leaf in jax.tree.leaves(arg))

        def one(slot: int) -> Any:
            own = lambda leaf: leaf[slot]  # noqa: E731
            return function(*(arg if axis is None else jax.tree.map(own, arg) for arg, axis in pairs))

        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(one, range(count)))

    return call


def squared_norms(tree: PyTree[Shaped[Array, "K ..."]]) -> Float32[Array, " K"]:
    """Squared L2 norm of each slot's model over all leaves of floats. [K, …] -> f32[K]."""
    return jnp.stack([_dots(leaf, leaf) for leaf in jax.tree.leaves(tree) if averages(leaf)]).sum(0)


def pairwise_cosine(leaves: list[Shaped[Array, "K ..."]]) -> Float32[Array, ""]:
    """Mean cosine over pairs of different slots, `leaves` (floats) taken together as one vector. -> f32[].

    1 for a single slot; a pair counts as 1 in which a slot is all zero. No matrix of pairs is made: of the n
    slots that are not zero, with directions u_k = w_k / ‖w_k‖ and their mean ū, the sum of 1 − cosine over
    all ordered pairs is n · Σ ‖u_k − ū‖², which is sure also where slots hardly differ.
    """
    count = leaves[0].shape[0]
    if count == 1:
        return jnp.float32(1)
    squares = squared_norms(leaves)
    nonzero = squares > 0
    inverse = jnp.where(nonzero, 1 / jnp.sqrt(jnp.where(nonzero, squares, 1)), 0)
    number = nonzero.sum().astype(jnp.float32)
    directions = [leaf.astype(jnp.float32) * _column(inverse, leaf) for leaf in leaves]
    center = mean(directions, nonzero.astype(jnp.float32) / jnp.maximum(number, 1))
    apart = squared_norms([leaf - middle[None] for leaf, middle in zip(directions, center, strict=True)])
    return 1 - number * jnp.where(nonzero, apart, 0).sum() / (count * (count - 1))


def dispersion(tree: PyTree[Shaped[Array, "K ..."]]) -> Float32[Array, ""]:
    """D = sum over slots of ‖w_k − w̄‖², all leaves of floats. [K, …] -> f32[]."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if averages(leaf)]
    return squared_norms(jax.tree.map(lambda leaf, c: leaf - c[None], leaves, mean(leaves))).sum()


def _dots(a: Shaped[Array, "K ..."], b: Shaped[Array, "K ..."]) -> Float32[Array, " K"]:
    a, b = (x.reshape(x.shape[0], -1).astype(jnp.float32) for x in (a, b))
    return jnp.einsum("kp,kp->k", a, b, precision=_FULL)


def _column(flags: Shaped[Array, " K"], leaf: Shaped[Array, "K ..."]) -> Shaped[Array, "K ..."]:
    """A number a slot, against a leaf [K, …] of any rank. -> [K, 1, …]."""
    return flags.reshape(flags.shape + (1,) * (leaf.ndim - flags.ndim))


def _wide(dtype: Any) -> Any:
    """In what a mean of this dtype is added up: float32 at least."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.float32 if narrow else dtype


def _least(dtype: Any, shape: tuple[int, ...] = ()) -> jax.Array:
    """The least value of integers or flags."""
    return jnp.full(shape, False if jnp.issubdtype(dtype, jnp.bool_) else jnp.iinfo(dtype).min, dtype)


def _multiple(size: int, devices: int) -> int:
    """The least multiple of `devices` that is not below `size`, nor 0."""
    return max(-(-size // devices), 1) * devices


def _wide_enough(flat: Shaped[Array, "K P"], width: int) -> Shaped[Array, "K {width}"]:
    """With columns of zeros up to `width`. [K, P] -> [K, width]."""
    return flat if flat.shape[1] == width else jnp.pad(flat, ((0, 0), (0, width - flat.shape[1])))


def _raw(tree: PyTree) -> PyTree:
    """A tree whose random keys are the integers that they are made of, as collectives want them."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _like(tree: PyTree, raw: PyTree) -> PyTree:
    """The keys again, where `tree` has them."""

    def one(leaf: jax.Array, raw: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else raw

    return jax.tree.map(one, tree, raw)


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _around(devices: int) -> list[tuple[int, int]]:
    return [(d, (d + 1) % devices) for d in range(devices)]


def _eager() -> bool:
    """Whether nothing is compiled, as under `jax.disable_jit`."""
    return jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue] dynamic attribute


def _on_many() -> bool:
    """Whether this is inside of `jax.shard_map`."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def _devices() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape).get(AXIS, 1) if not mesh.empty else 1


def platform() -> str:
    """What the mesh's devices are, as JAX names them: cpu, gpu, tpu. Without a mesh, the default ones.

    Those of a program that is compiled for another machine are not the default ones.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform
