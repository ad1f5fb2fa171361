"""The recipes that cut one set into clients: functions of labels (or ids) and a NumPy generator.

Each returns one array of indices for each client. The two things called Dirichlet have two names:
`dirichlet` draws over clients for each class, `dirichlet_classes` over classes for each client.
"""

import math
from collections.abc import Sequence

import numpy as np

from fedjax_sim.core.errors import UserError
from fedjax_sim.data.ragged import Ragged, runs

Parts = Ragged
"""i64[n_k] for each client."""


def iid(count: int, clients: int, rng: np.random.Generator) -> Parts:
    """A random permutation, cut evenly: sizes differ by one at most."""
    order, sizes = rng.permutation(count), _even(count, clients)
    # In place: of a hundred million samples each further array would be 0.8 GB.
    more = int(sizes.sum() - len(sizes) * sizes.min())  # clients with one more than the others, the first
    for part, width in (
        (order[: more * sizes.max()], sizes.max()),
        (order[more * sizes.max() :], sizes.min()),
    ):
        if width:
            part.reshape(-1, width).sort(axis=1)
    return Ragged.cut(order, sizes)


def dirichlet(
    labels: np.ndarray, clients: int, alpha: float, min_size: int, max_tries: int, rng: np.random.Generator
) -> tuple[Parts, int]:
    """FedMR's split (FOUND, `separate_data` of its released code, with b = alpha).

    For each class: p ~ Dir(alpha * 1_N); p_j = 0 for clients that hold n / N samples or more;
    renormalise; cut the shuffled class at floor(cumsum(p) * n_c), the last client taking the rest.
    All of it is drawn again until every client holds `min_size`. Sizes are drawn first and samples
    handed out once they are accepted, which gives the same distribution sooner. Two differences:
    the retries are bounded, and a draw whose remaining p are all zero (tiny alpha) counts as failed.

    Args:
      labels: i32[n], classes of the samples.
      clients: N.
      alpha: of the Dirichlet distribution; small ones make clients with few classes.
      min_size: samples that each client has at least; 1 or more.
      max_tries: draws at most.
      rng: advances with each draw.

    Returns:
      The parts (disjoint and complete), and how many draws it took.

    Raises:
      UserError: after `max_tries` draws, with the best smallest client that was seen.
    """
    members = _grouped(labels)[1]
    min_size, best = max(min_size, 1), 0
    for attempt in range(1, max_tries + 1):
        cuts = _draw_cuts([len(m) for m in members], clients, alpha, len(labels) / clients, rng)
        if cuts is None:
            continue
        smallest = int(np.diff(cuts, axis=1).sum(0).min())
        best = max(best, smallest)
        if smallest >= min_size:
            shuffled = np.concatenate([rng.permutation(m) for m in members])
            owners = np.concatenate([np.repeat(np.arange(clients), np.diff(row)) for row in cuts])
            return Ragged.gathered(owners, shuffled, clients), attempt
    why = (
        f"in {max_tries} draws the smallest of {clients} clients never had {min_size} samples; "
        f"the best draw reached {best}"
    )
    each = len(labels) / clients
    if each < 5:
        fix = f"Use fewer partition.clients or a larger set: {len(labels)} samples are {each:.1f} a client."
        raise UserError("partition.alpha", alpha, why, fix)
    lower = f"Set partition.min_size to {best} or less, raise" if best else "Raise"
    fix = (
        f"{lower} partition.alpha or partition.max_tries, use fewer partition.clients, or use kind "
        "'dirichlet-classes', where every client has the same size."
    )
    raise UserError("partition.alpha", alpha, why, fix)


def _draw_cuts(
    counts: list[int], clients: int, alpha: float, cap: float, rng: np.random.Generator
) -> np.ndarray | None:
    """i64[C, N + 1]: where each class is cut; None where no client is left with a positive share."""
    sizes = np.zeros(clients, np.int64)
    cuts = np.zeros((len(counts), clients + 1), np.int64)
    for row, count in zip(cuts, counts, strict=True):
        shares = rng.dirichlet(np.full(clients, alpha)) * (sizes < cap)
        if not shares.sum() > 0:
            return None
        row[1:-1] = (np.cumsum(shares / shares.sum()) * count).astype(np.int64)[:-1].clip(max=count)
        row[-1] = count
        sizes += np.diff(row)
    return cuts


def class_mixes(alpha: float, clients: int, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """One Dirichlet(alpha) draw over classes for each client.

    Args:
      alpha: of the Dirichlet distribution.
      clients: N.
      num_classes: C.
      rng: advances.

    Returns:
      f64[N, C], each row sums to 1.
    """
    return rng.dirichlet(np.full(num_classes, alpha), clients)


def counts_of_mixes(mixes: np.ndarray, size: int) -> np.ndarray:
    """LIPS's rounding: round(size * q) class by class, never beyond `size`, the last class the rest.

    i64[N, C] with rows that sum to `size`.
    """
    counts = np.zeros(mixes.shape, np.int64)
    left = np.full(len(mixes), size, np.int64)
    for c in range(mixes.shape[1]):
        wanted = np.floor(size * mixes[:, c] + 0.5).astype(np.int64)
        counts[:, c] = left if c == mixes.shape[1] - 1 else np.minimum(wanted, left)
        left = left - counts[:, c]
    return counts


def draw_counts(labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator, field: str) -> Parts:
    """For each client, `counts[k, c]` samples of class c, drawn independently of the other clients.

    Without replacement inside a client, except where the class has fewer samples than are asked for
    (FOUND, LIPS's `dirichlet_sampling`). So clients may share samples.

    Args:
      labels: i32[n], classes of the samples.
      counts: i64[N, C].
      rng: advances.
      field: dotted name of the setting that asks for them, for messages.

    Raises:
      UserError: samples are wanted of a class that has none.
    """
    members = _members(labels, counts.shape[1])
    available = members.sizes
    empty = np.flatnonzero((available == 0) & counts.any(0))
    if len(empty):
        why = "this class has no samples to draw from"
        raise UserError(field, int(empty[0]), why, "Remove the class, or add samples.")
    clients, classes = np.nonzero(counts)
    wanted = counts[clients, classes]
    picked = choices(available[classes], wanted, rng)
    samples = members.flat[np.repeat(members.offsets[classes], wanted) + picked]
    return Ragged.gathered(np.repeat(clients, wanted), samples, len(counts))


def pathological(labels: np.ndarray, clients: int, per_client: int, rng: np.random.Generator) -> Parts:
    """Exactly `per_client` classes for each client; each class shared evenly among those who hold it.

    Classes are dealt so that the numbers of holders differ by one at most. Disjoint, and complete
    if clients * per_client >= classes.

    Args:
      labels: i32[n], classes of the samples.
      clients: N.
      per_client: classes of each; more than the set has are not taken.
      rng: advances.

    Raises:
      UserError: a class has fewer samples than clients that hold it.
    """
    present, members_of = _grouped(labels)
    held = _dealt(clients, len(present), min(per_client, len(present)), rng)
    owners, samples = [], []
    for column, c, own in zip(held.T, present, members_of, strict=True):
        holders = rng.permutation(np.flatnonzero(column))
        members = rng.permutation(own)
        if len(members) < len(holders):
            why = f"class {c} has {len(members)} samples for {len(holders)} clients"
            raise UserError(
                "partition.clients", clients, why, "Use fewer clients, or fewer classes for each."
            )
        if len(holders):
            owners.append(np.repeat(holders, _even(len(members), len(holders))))
            samples.append(members)
    return Ragged.gathered(np.concatenate(owners), np.concatenate(samples), clients)


def _dealt(clients: int, classes: int, each: int, rng: np.random.Generator) -> np.ndarray:
    """bool[N, C]: which classes each client holds, `each` of them.

    One client after another, in random order, takes the classes with the fewest holders, a random one of
    those alike. After `lap` clients all classes have equally many holders, so that laps do not depend on one
    another: the first clients of many laps choose side by side, then the second ones.
    """
    order = rng.permutation(clients)
    held = np.zeros((clients, classes), bool)
    lap = classes // math.gcd(classes, each)
    together = lap * max(1, _AT_ONCE // (lap * classes))
    for start in range(0, clients, together):
        own = order[start : start + together]
        laps = -(-len(own) // lap)
        ranks = np.zeros((laps * lap, classes))
        ranks[: len(own)] = rng.random((len(own), classes))
        ranks, chosen = ranks.reshape(laps, lap, classes), np.zeros((laps, lap, classes), bool)
        holders = np.zeros((laps, classes), np.int64)
        for place in range(lap):
            first = np.lexsort((ranks[:, place], holders))[:, :each]
            np.put_along_axis(chosen[:, place], first, True, axis=1)
            holders += chosen[:, place]
        held[own] = chosen.reshape(-1, classes)[: len(own)]
    return held


def shards(labels: np.ndarray, clients: int, per_client: int, rng: np.random.Generator) -> Parts:
    """McMahan et al. (2017): sort by class, cut into clients * per_client shards, deal them out.

    Unlike `pathological`, a shard may lie across two classes and a client may get one class twice.

    Args:
      labels: i32[n], classes of the samples.
      clients: N.
      per_client: shards of each.
      rng: advances.
    """
    by_class = rng.permutation(len(labels))
    by_class = by_class[np.argsort(labels[by_class], kind="stable")]
    pieces = clients * per_client
    owner_of_piece = np.empty(pieces, np.int64)
    owner_of_piece[rng.permutation(pieces)] = np.repeat(np.arange(clients), per_client)
    return Ragged.gathered(np.repeat(owner_of_piece, _even(len(labels), pieces)), by_class, clients)


def by_group(groups: np.ndarray, clients: int, rng: np.random.Generator) -> tuple[Parts, np.ndarray]:
    """Clients spread over the groups as evenly as can be; inside a group, an iid split.

    Returns:
      The parts, in the order of the groups, and i64[N]: each client's group id.
    """
    ids, members_of = _grouped(groups)
    shares = _even(clients, len(ids))
    samples = np.concatenate([rng.permutation(members) for members in members_of])
    sizes = [_even(len(members), int(share)) for members, share in zip(members_of, shares, strict=True)]
    owners = np.repeat(np.arange(clients), np.concatenate(sizes))
    return Ragged.gathered(owners, samples, clients), np.repeat(ids, shares).astype(np.int64)


def by_writer(
    writers: np.ndarray, clients: int | None, min_size: int, rng: np.random.Generator
) -> tuple[Parts, np.ndarray]:
    """One client for each writer with `min_size` samples; a random choice of `clients` of them if given.

    Args:
      writers: i32[n], who wrote each sample.
      clients: N; None: all writers that have enough.
      min_size: samples that a writer needs.
      rng: advances if `clients` is given.

    Returns:
      The parts, in the order of the writer ids, and i64[N]: those ids.

    Raises:
      UserError: fewer writers have enough samples than clients are wanted, or none has.
    """
    ids, counts = np.unique(writers, return_counts=True)
    enough = ids[counts >= min_size]
    if not len(enough) or (clients is not None and clients > len(enough)):
        why = f"of {len(ids)} writers {len(enough)} have {min_size} samples or more"
        raise UserError(
            "partition.clients", clients, why, "Ask for fewer clients, or lower partition.min_size."
        )
    chosen = enough if clients is None else np.sort(rng.choice(enough, clients, replace=False))
    order = np.argsort(writers, kind="stable")
    starts = np.searchsorted(writers[order], chosen)
    sizes = counts[np.searchsorted(ids, chosen)]
    return Ragged.cut(order[runs(starts, sizes)], sizes), chosen.astype(np.int64)


def quantity(count: int, clients: int, sigma: float, min_size: int, rng: np.random.Generator) -> Parts:
    """Sizes proportional to exp(sigma * N(0, 1)) above a floor of `min_size`; labels iid.

    Everyone gets the floor, and what is left is shared out (our choice: no retries needed).

    Args:
      count: n, samples to hand out; clients * max(min_size, 1) at least.
      clients: N.
      sigma: standard deviation of the logarithms of sizes.
      min_size: samples that each client has at least; 1 or more.
      rng: advances.
    """
    logs = sigma * rng.standard_normal(clients)
    weights = np.exp(logs - logs.max())
    floor = max(min_size, 1)
    sizes = floor + largest_remainder(weights / weights.sum(), count - floor * clients)
    return Ragged.gathered(np.repeat(np.arange(clients), sizes), rng.permutation(count), clients)


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """f64[..., C] that sum to 1 -> i64[..., C] that sum to `total`, each within 1 of share * total."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(-(exact - counts), axis=-1, kind="stable"), axis=-1, kind="stable")
    return counts + (rank < (total - counts.sum(-1, keepdims=True)))


def hold_out(parts: Sequence[np.ndarray], share: float, rng: np.random.Generator) -> tuple[Parts, Parts]:
    """Splits each client's samples into train and test, at least one each.

    Splits by sample, not by occurrence: an index that a client holds twice stays on one side, and one that
    several clients hold is on the same side for all of them, so that nobody trains on what another tests on.
    A client's share is exact where it shares nothing; else the clients before it have decided a part of it.

    Raises:
      UserError: a client has too few samples, or those before it left it nothing to train or to test on.
    """
    parts = Ragged.of(parts)
    unique = parts.distinct()
    tested = np.zeros(1 + int(unique.flat.max(initial=0)), bool)
    if not (np.bincount(unique.flat) > 1).any():
        few = np.flatnonzero(unique.sizes < 2)
        if len(few):
            raise _too_few(int(few[0]), int(unique.sizes[few[0]]))
        wanted = np.rint(share * unique.sizes).clip(1, unique.sizes - 1).astype(np.int64)
        picked = np.repeat(unique.offsets[:-1], wanted) + choices(unique.sizes, wanted, rng)
        tested[unique.flat[picked]] = True
    else:
        _decide_in_turn(unique, share, rng, tested)
    return parts.kept(~tested[parts.flat]), unique.kept(tested[unique.flat])


def _decide_in_turn(parts: Ragged, share: float, rng: np.random.Generator, tested: np.ndarray) -> None:
    """`hold_out` of clients that share samples: each decides of those that the ones before it left open.

    Args:
      parts: what each holds, once.
      share: that is to be held out.
      rng: advances.
      tested: bool[n], all False; gets True where a sample is held out.
    """
    decided = np.zeros(len(tested), bool)
    for k, unique in enumerate(parts):
        if len(unique) < 2:
            raise _too_few(k, len(unique))
        count = min(max(1, round(share * len(unique))), len(unique) - 1)
        free = unique[~decided[unique]]
        wanted = count - int(np.count_nonzero(tested[unique]))
        chosen = rng.choice(free, min(max(wanted, 0), len(free)), replace=False)
        decided[free], tested[chosen] = True, True
        held_out = int(np.count_nonzero(tested[unique]))
        if held_out in (0, len(unique)):
            others = "train on" if not held_out else "hold out"
            why = f"clients before it {others} all {len(unique)} samples of client {k}"
            fix = "Use clients that share fewer samples, or local_test 'matching'."
            raise UserError("partition.local_test", "holdout", why, fix)


def _too_few(client: int, count: int) -> UserError:
    why = f"client {client} has {count} sample{'s' * (count != 1)}, too few to hold one out"
    fix = "Use fewer partition.clients or a partition.min_size of 2, or set partition.local_test to matching."
    return UserError("partition.local_test", "holdout", why, fix)


# --- draws for many clients at once ---------------------------------------------------------------------

_AT_ONCE = 2**21
"""Random numbers that lie in memory together, about."""


def choices(populations: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`rng.choice(population, size, replace=size > population)` for one pair after another, in few calls.

    What is chosen and what `rng` draws afterwards are the same as with these calls, but the order within a
    pair is not: with Floyd's method, which is NumPy's for small choices, it calls for all random numbers of
    many pairs at once, those of NumPy's last shuffle too.

    Args:
      populations: i64[G], at least 1.
      sizes: i64[G], at least 1.
      rng: advances.

    Returns:
      i64[sum of sizes], places in the population, pair after pair.
    """
    # NumPy shuffles all of a large population of which many are chosen.
    shuffled = (populations > 10_000) & (sizes > populations // 50) & (sizes <= populations)
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    apart, full = np.flatnonzero(shuffled), np.searchsorted(ends, np.arange(_AT_ONCE, total, _AT_ONCE))
    cuts = np.unique(np.concatenate([[0, len(sizes)], apart, apart + 1, full]))
    picked = np.empty(total, np.int64)
    for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        place = slice(int(ends[first] - sizes[first]), int(ends[last - 1]))
        if shuffled[first]:
            picked[place] = rng.choice(int(populations[first]), int(sizes[first]), replace=False)
        else:
            picked[place] = _floyd(populations[first:last], sizes[first:last], rng)
    return picked


def _floyd(populations: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`choices` without large populations of which many are chosen.

    Floyd's method draws one number up to `population - size`, then one up to one more, and so on; one that is
    chosen already stands for its own upper bound. NumPy then draws once more to shuffle them.
    """
    repeats = sizes > populations
    draws = np.where(repeats, sizes, 2 * sizes - 1)
    turn = runs(np.zeros(len(sizes), np.int64), draws)
    size, lowest = np.repeat(sizes, draws), np.repeat(np.where(repeats, 0, populations - sizes), draws)
    bounds = np.where(turn < size, lowest + turn, 2 * size - 1 - turn)
    again = np.repeat(repeats, draws)
    bounds[again] = np.repeat(populations, draws)[again] - 1
    kind = np.uint32 if int(bounds.max()) < 2**32 else np.uint64  # both draw from the same stream
    drawn = rng.integers(0, bounds.astype(kind), endpoint=True, dtype=kind).astype(np.int64)
    real = turn < size
    drawn, lowest, turn, again = drawn[real], lowest[real], turn[real], again[real]
    keys = np.repeat(np.arange(len(sizes)), sizes) * np.int64(populations.max()) + drawn
    order = np.argsort(keys, kind="stable")
    seen = np.zeros(len(drawn), bool)  # drawn before in its pair
    seen[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    # A number may also be chosen already as the bound that an earlier turn stood for: if that turn's was.
    place, start = np.arange(len(drawn)), np.repeat(np.cumsum(sizes) - sizes, sizes)
    earlier = (drawn >= lowest) & (drawn < lowest + turn) & ~seen
    asks = np.where(earlier, start + drawn - lowest, place)
    while True:
        further = asks[asks]
        if np.array_equal(further, asks):
            break
        asks = further
    return np.where(seen[asks] & ~again, lowest + turn, drawn)


def _even(count: int, pieces: int) -> np.ndarray:
    """i64[pieces]: sizes that add up to `count` and differ by one at most, the larger ones first."""
    return count // pieces + (np.arange(pieces) < count % pieces)


def _grouped(ids: np.ndarray) -> tuple[np.ndarray, Ragged]:
    """i[n] -> (the ids that there are, ascending; the places of each, ascending)."""
    if len(ids) and ids.min() >= 0 and ids.max() < max(len(ids), 2**16):
        members = _members(ids, 0)
        present = np.flatnonzero(members.sizes)
        return present, Ragged.cut(members.flat, members.sizes[present])
    present, codes = np.unique(ids, return_inverse=True)
    return present, _members(codes, len(present))


def _members(labels: np.ndarray, classes: int) -> Ragged:
    """The places of each class, ascending.

    Args:
      labels: i[n], from 0.
      classes: C, or one more than the largest label if that is more.
    """
    sizes = np.bincount(labels, minlength=classes)
    small = labels.astype(np.uint16) if len(sizes) <= 2**16 else labels  # which NumPy sorts by radix
    return Ragged.cut(np.argsort(small, kind="stable"), sizes)
