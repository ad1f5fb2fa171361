"""A run's samples on its devices: each array once, whoever reads it, and who holds what as one flat table.

The round, the evaluators, the diagnostics and a run inside a run all take their samples from one `DataStore`,
and a plan of memory asks the same object what it would hold.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.stacked import AXIS
from fedjax_sim.core.task import Example
from fedjax_sim.data import Partition, Samples
from fedjax_sim.data.ragged import Ragged
from fedjax_sim.engine import placement


@struct.dataclass
class Rows:
    """Samples of several axes, such as images, that are taken by their numbers: each is held as one flat row.

    An array [n, H, W, C] lies on a TPU with n innermost. A round that takes some images would copy all n
    first, in tiles that few channels fill badly: 586 of the 753 MiB of temporaries of a round of LeNet.

    Attributes:
      flat: [n, S].
      one: the shape of a sample, of S numbers.
    """

    flat: jax.Array
    one: tuple[int, ...] = struct.field(pytree_node=False)

    def __getitem__(self, index: Any) -> jax.Array:
        """The samples of some numbers. i32[…] -> […, *one]."""
        rows = self.flat[index]
        return rows.reshape(*rows.shape[:-1], *self.one)

    def __len__(self) -> int:
        """How many there are, n."""
        return len(self.flat)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, *one)."""
        return len(self.flat), *self.one


@struct.dataclass
class DeviceData:
    """The training set and who holds what of it, whole on every device. The round reads this.

    Attributes:
      train: the training samples as they are stored, leaves [n, …], those of several axes as `Rows`.
      samples: i32[T], rows of `train`: those of client 0, those of client 1 and so on, then zeros.
      offsets: i32[N + 1]; client k holds samples[offsets[k] : offsets[k + 1]].
      rng_ids: i32[N], the number that each client's randomness is keyed by; None: its id.
    """

    train: Example
    samples: jax.Array
    offsets: jax.Array
    rng_ids: jax.Array | None = None

    @property
    def spec(self) -> P:
        """How `jax.shard_map` hands it to a device: whole."""
        return P()

    def exchanged(self) -> "DeviceData":
        """Itself: each device has the samples of its clients."""
        return self

    def first_of(self, ids: jax.Array) -> jax.Array:
        """Where clients' samples begin among those that a device has. i32[S] -> i32[S]."""
        return self.offsets[ids]

    def numbers_of(self, ids: jax.Array) -> jax.Array:
        """What clients' randomness is keyed by. i32[S] -> i32[S]."""
        return ids if self.rng_ids is None else self.rng_ids[ids]

    def rows_at(self, places: jax.Array) -> jax.Array:
        """Rows of `train`, of places counted from a client's first. i32[…] -> i32[…]."""
        return self.samples[places]


@struct.dataclass
class CohortData:
    """The samples of one round's clients, each on the device that trains the client. The round reads this.

    Attributes:
      train: leaves [D * T, …]; each device has T samples: those of its first place's client, those of the
        next and so on, then any.
      first: i32[D * S], where those of each place's client begin among its device's.
      rng_ids: i32[D * S], the number that the randomness of each place's client is keyed by; None: its id.
    """

    train: Example
    first: jax.Array
    rng_ids: jax.Array | None = None

    @property
    def spec(self) -> P:
        """How `jax.shard_map` hands it to a device: its own part."""
        return P(AXIS)

    def exchanged(self) -> "CohortData":
        """Itself: each device has the samples of its clients."""
        return self

    def first_of(self, ids: jax.Array) -> jax.Array:
        """As `DeviceData.first_of`, of all places of a device. i32[S] -> i32[S]."""
        del ids
        return self.first

    def numbers_of(self, ids: jax.Array) -> jax.Array:
        """As `DeviceData.numbers_of`, of all places of a device. i32[S] -> i32[S]."""
        return ids if self.rng_ids is None else self.rng_ids

    def rows_at(self, places: jax.Array) -> jax.Array:
        """As `DeviceData.rows_at`. i32[…] -> i32[…]."""
        return places


def sample_table(partition: Partition, train_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Who holds what, (samples i32[T], offsets i32[N + 1]) as in `DeviceData`.

    T depends on the set alone where no sample is held twice, so that partitions of other seeds find the same
    shapes and the same compiled program; else the clients' total is rounded up to four sizes an octave.

    Args:
      partition: N clients.
      train_size: n, training samples of the set.

    Raises:
      UserError: clients hold more samples than 32 bits count.
    """
    offsets = np.concatenate([[0], np.cumsum(partition.sizes())])
    total = int(offsets[-1])
    if total >= 2**31:
        raise UserError(
            "partition.train",
            total,
            "clients hold so many samples together, and 2147483647 can be counted",
            "Give clients fewer samples, or let fewer clients hold the same one.",
        )
    samples = np.zeros(train_size if total <= train_size else rounded_up(total), np.int32)
    samples[:total] = Ragged.of(partition.train).flat
    return samples, offsets.astype(np.int32)


def rounded_up(size: int) -> int:
    """The next of … 16, 20, 24, 28, 32, 40 …; sizes up to 16 stay."""
    if size <= 16:
        return size
    quarter = 1 << (size - 1).bit_length() - 3
    return -(-size // quarter) * quarter


def order_lengths(counts: np.ndarray) -> tuple[int, ...]:
    """Lengths that clients' samples are put in order at, ascending; the last holds the largest client.

    A wave takes the shortest that holds its own largest client. They depend on the mean m and, as little as
    can be, on the largest client, so that partitions of other seeds find the same compiled program: clients
    of equal size have one length, which is theirs, and nearly equal ones (from 15/16 m to 17/16 m, as IID
    splits and shards give) another. For all others there are lengths up to a power of two from 4 m on, and
    one of 8 times that, up to 2^15, for who is larger still: of Dirichlet partitions mostly one program is
    found by any seed and any skew.

    Args:
      counts: i64[N], training samples of each client.
    """
    smallest, largest, total = int(counts.min()), max(int(counts.max()), 1), int(counts.sum())
    if smallest == counts.max():
        return (largest,)
    below, mean = total // len(counts), -(-total // len(counts))
    if below - below // 16 <= smallest and largest <= mean + mean // 16:
        return (rounded_up(mean + mean // 16),)
    whole = 1 << (total - 1).bit_length()  # no client has more
    usual = min(1 << (4 * mean - 1).bit_length(), whole)
    last = max(usual, min(8 * usual, 2**15))
    while last < largest:
        last *= 2
    lengths = {usual, min(last, whole)}
    while usual > 128:
        usual //= 4
        lengths.add(usual)
    return tuple(sorted(lengths | {length for length in (32, 64) if length < max(lengths)}))


class DataStore:
    """Places arrays on all devices of a mesh; one that is asked for again is not placed again.

    Attributes:
      mesh: the devices.
    """

    def __init__(
        self,
        mesh: Mesh,
        place: Callable[[np.ndarray, NamedSharding], Any] = placement.put,
        near: "DataStore | None" = None,
    ):
        """Holds nothing yet.

        Args:
          mesh: the devices.
          place: puts an array on the devices; `abstract` puts nothing, for a plan of memory.
          near: has arrays on some of these devices; what lies there is not placed there again.
        """
        self.mesh, self._place, self._near = mesh, place, near
        self._placed: dict[int, tuple[np.ndarray, Any]] = {}  # by identity; held here, an array keeps its id

    def on(self, mesh: Mesh) -> "DataStore":
        """One for other devices, which takes what lies here already."""
        return DataStore(mesh, self._place, near=self)

    @property
    def shares_host(self) -> bool:
        """Whether the devices read one buffer in the host's memory, as those of a CPU do."""
        return placement.platform_of(self.mesh) == "cpu"

    def put(self, array: np.ndarray) -> Any:
        """The array, any shape [n, …], whole on every device; of more than two axes as `Rows`."""
        if id(array) not in self._placed:
            flat = array.reshape(len(array), -1) if array.ndim > 2 else array
            there = None if self._near is None else self._near._placed.get(id(array))
            where = placement.replicated(self.mesh)
            if there is None or self._place is abstract:
                placed = self._place(flat, where)
            else:
                found = there[1].flat if isinstance(there[1], Rows) else there[1]
                placed = placement.put_beside(found, flat, where)
            self._placed[id(array)] = array, Rows(placed, array.shape[1:]) if array.ndim > 2 else placed
        return self._placed[id(array)][1]

    def key(self, key: jax.Array) -> Any:
        """A key[], on every device."""
        words = self._place(np.asarray(jax.random.key_data(key)), placement.replicated(self.mesh))
        if isinstance(words, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=words.sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))

    def cut(self, array: np.ndarray) -> Any:
        """The array [n, …], which the D devices divide: each has its n / D rows."""
        return self._place(array, placement.cut(self.mesh))

    def same(self, array: np.ndarray) -> Any:
        """The array, any shape [n, …], whole on every device, and not kept for others."""
        return self._place(array, placement.replicated(self.mesh))

    def cut_whole(self, example: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Samples, leaves [n, …], cut over the devices, filled up where these do not divide them."""
        shares = np.arange(len(next(iter(example.values()))))
        length = -(-len(shares) // self.mesh.size)
        rows = tuple(shares[start : start + length] for start in range(0, self.mesh.size * length, length))
        return {
            key: self.by_device(leaf, rows, length, lambda index, leaf=leaf: leaf[index])
            for key, leaf in example.items()
        }

    def by_device(
        self,
        array: np.ndarray,
        rows: tuple[np.ndarray, ...],
        length: int,
        read: Callable[[np.ndarray], np.ndarray],
    ) -> Any:
        """Some rows of an array [n, …] on each device, filled up with zeros to the same number of them.

        Only rows of this process's own devices are read.

        Args:
          array: of any shape [n, …]; of more than two axes the result is `Rows`.
          rows: i64[t_d] of each device d.
          length: T, rows of a device in the end.
          read: gives rows i64[t] of the array.

        Returns:
          [D * T, …], cut over the devices.
        """
        one = array.shape[1:]
        flat = (int(np.prod(one)),) if len(one) > 1 else one
        shape, sharding = (self.mesh.size * length, *flat), placement.cut(self.mesh)
        if self._place is abstract:
            made: Any = jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)
        else:

            def part(index: Any) -> np.ndarray:
                own = rows[(index[0].start or 0) // length]
                block = np.zeros((length, *flat), array.dtype)
                block[: len(own)] = read(own).reshape(len(own), *flat)
                return block

            made = jax.make_array_from_callback(shape, sharding, part)
        return Rows(made, one) if len(one) > 1 else made

    def whole(self, example: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Samples, leaves [n, …], whole on every device, as `put` has them."""
        return {key: self.put(leaf) for key, leaf in example.items()}

    def has(self, example: Mapping[str, np.ndarray]) -> bool:
        """Whether these very samples, leaves [n, …], are whole on every device."""
        return all(id(leaf) in self._placed for leaf in example.values())

    def of_round(self, dataset: Samples, partition: Partition) -> DeviceData:
        """What the round of a run reads."""
        samples, offsets = sample_table(partition, dataset.train_size)
        rng_ids = partition.rng_ids
        return DeviceData(
            self.whole(dataset.train),
            self.put(samples),
            self.put(offsets),
            None if rng_ids is None else self.put(rng_ids),
        )


def abstract(array: np.ndarray, sharding: NamedSharding) -> Any:
    """The shape and dtype of an array of any shape [n, …], as it would be on the devices."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
