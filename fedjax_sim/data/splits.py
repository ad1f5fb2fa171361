"""The recipes that cut one set into clients: functions of labels (or ids) and a NumPy generator.

Each returns one array of indices for each client. The two things called Dirichlet have two names:
`dirichlet` draws over clients for each class, `dirichlet_classes` over classes for each client.
"""

import numpy as np

from fedjax_sim.core.errors import UserError

Parts = list[np.ndarray]
"""i64[n_k] for each client."""


def iid(count: int, clients: int, rng: np.random.Generator) -> Parts:
    """A random permutation, cut evenly: sizes differ by one at most."""
    return [np.sort(p) for p in np.array_split(rng.permutation(count), clients)]


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
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    min_size, best = max(min_size, 1), 0
    for attempt in range(1, max_tries + 1):
        cuts = _draw_cuts([len(m) for m in members], clients, alpha, len(labels) / clients, rng)
        if cuts is None:
            continue
        smallest = int(np.diff(cuts, axis=1).sum(0).min())
        best = max(best, smallest)
        if smallest >= min_size:
            shuffled = [rng.permutation(m) for m in members]
            return [
                np.sort(np.concatenate([m[c[k] : c[k + 1]] for m, c in zip(shuffled, cuts, strict=True)]))
                for k in range(clients)
            ], attempt
    why = (
        f"in {max_tries} draws the smallest of {clients} clients never had {min_size} samples; "
        f"the best draw reached {best}"
    )
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
    members = [np.flatnonzero(labels == c) for c in range(counts.shape[1])]
    empty = [c for c, m in enumerate(members) if not len(m) and counts[:, c].any()]
    if empty:
        raise UserError(
            field, empty[0], "this class has no samples to draw from", "Remove the class, or add samples."
        )
    return [
        np.sort(
            np.concatenate(
                [rng.choice(m, n, replace=n > len(m)) for m, n in zip(members, row, strict=True) if n]
            )
        )
        for row in counts
    ]


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
    present = np.unique(labels)
    held = np.zeros((clients, len(present)), bool)
    for k in rng.permutation(clients):
        order = np.lexsort((rng.random(len(present)), held.sum(0)))
        held[k, order[:per_client]] = True
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for column, c in zip(held.T, present, strict=True):
        holders = rng.permutation(np.flatnonzero(column))
        members = rng.permutation(np.flatnonzero(labels == c))
        if len(members) < len(holders):
            why = f"class {c} has {len(members)} samples for {len(holders)} clients"
            raise UserError(
                "partition.clients", clients, why, "Use fewer clients, or fewer classes for each."
            )
        if len(holders):
            for k, piece in zip(holders, np.array_split(members, len(holders)), strict=True):
                parts[k].append(piece)
    return [np.sort(np.concatenate(p)) for p in parts]


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
    pieces = np.array_split(by_class, clients * per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.sort(np.concatenate([pieces[s] for s in row])) for row in dealt]


def by_group(groups: np.ndarray, clients: int, rng: np.random.Generator) -> tuple[Parts, np.ndarray]:
    """Clients spread over the groups as evenly as can be; inside a group, an iid split.

    Returns:
      The parts, in the order of the groups, and i64[N]: each client's group id.
    """
    ids = np.unique(groups)
    parts: Parts = []
    owner: list[int] = []
    for i, g in enumerate(ids):
        share = clients // len(ids) + (i < clients % len(ids))
        members = rng.permutation(np.flatnonzero(groups == g))
        parts += [np.sort(p) for p in np.array_split(members, share)]
        owner += [int(g)] * share
    return parts, np.array(owner, np.int64)


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
    return [order[s : s + n] for s, n in zip(starts, sizes, strict=True)], chosen.astype(np.int64)


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
    return [np.sort(p) for p in np.split(rng.permutation(count), np.cumsum(sizes)[:-1])]


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """f64[..., C] that sum to 1 -> i64[..., C] that sum to `total`, each within 1 of share * total."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(-(exact - counts), axis=-1, kind="stable"), axis=-1, kind="stable")
    return counts + (rank < (total - counts.sum(-1, keepdims=True)))


def hold_out(parts: Parts, share: float, rng: np.random.Generator) -> tuple[Parts, Parts]:
    """Splits each client's samples into train and test, at least one each.

    Splits by sample, not by occurrence: an index that a client holds twice stays on one side, and one that
    several clients hold is on the same side for all of them, so that nobody trains on what another tests on.
    A client's share is exact where it shares nothing; else the clients before it have decided a part of it.

    Raises:
      UserError: a client has too few samples, or those before it left it nothing to train or to test on.
    """
    undecided, trains, tests = range(3)
    side = np.full(1 + max((int(p.max()) for p in parts if len(p)), default=0), undecided, np.int8)
    train, test = [], []
    for k, part in enumerate(parts):
        unique = np.unique(part)
        if len(unique) < 2:
            why = f"client {k} has {len(unique)} samples, too few to hold one out"
            raise UserError("partition.local_test", "holdout", why, "Raise partition.min_size to 2 or more.")
        count = min(max(1, round(share * len(unique))), len(unique) - 1)
        free = unique[side[unique] == undecided]
        wanted = count - int((side[unique] == tests).sum())
        chosen = rng.choice(free, min(max(wanted, 0), len(free)), replace=False)
        side[free], side[chosen] = trains, tests
        held_out = unique[side[unique] == tests]
        if len(held_out) in (0, len(unique)):
            others = "train on" if not len(held_out) else "hold out"
            why = f"clients before it {others} all {len(unique)} samples of client {k}"
            fix = "Use clients that share fewer samples, or local_test 'matching'."
            raise UserError("partition.local_test", "holdout", why, fix)
        train.append(part[side[part] == trains])
        test.append(held_out)
    return train, test
