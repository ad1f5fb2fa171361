"""The recipes of `fedjax_sim.data.splits` as loops over clients, which is how they were first written.

A seed gives what it gave: each new spelling must hand out the same samples, and leave the generator where
these leave it.
"""

import numpy as np


def iid(count, clients, rng):
    return [np.sort(p) for p in np.array_split(rng.permutation(count), clients)]


def handed_out(labels, cuts, rng):
    """The second half of `dirichlet`, of cuts i64[C, N + 1] that were accepted."""
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    shuffled = [rng.permutation(m) for m in members]
    return [
        np.sort(np.concatenate([m[c[k] : c[k + 1]] for m, c in zip(shuffled, cuts, strict=True)]))
        for k in range(cuts.shape[1] - 1)
    ]


def draw_counts(labels, counts, rng):
    members = [np.flatnonzero(labels == c) for c in range(counts.shape[1])]
    return [
        np.sort(
            np.concatenate(
                [rng.choice(m, n, replace=n > len(m)) for m, n in zip(members, row, strict=True) if n]
            )
        )
        for row in counts
    ]


def pathological(labels, clients, per_client, rng):
    present = np.unique(labels)
    held = np.zeros((clients, len(present)), bool)
    for k in rng.permutation(clients):
        order = np.lexsort((rng.random(len(present)), held.sum(0)))
        held[k, order[:per_client]] = True
    parts = [[] for _ in range(clients)]
    for column, c in zip(held.T, present, strict=True):
        holders = rng.permutation(np.flatnonzero(column))
        members = rng.permutation(np.flatnonzero(labels == c))
        if len(holders):
            for k, piece in zip(holders, np.array_split(members, len(holders)), strict=True):
                parts[k].append(piece)
    return [np.sort(np.concatenate(p)) for p in parts]


def shards(labels, clients, per_client, rng):
    by_class = rng.permutation(len(labels))
    by_class = by_class[np.argsort(labels[by_class], kind="stable")]
    pieces = np.array_split(by_class, clients * per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.sort(np.concatenate([pieces[s] for s in row])) for row in dealt]


def by_group(groups, clients, rng):
    ids = np.unique(groups)
    parts, owner = [], []
    for i, g in enumerate(ids):
        share = clients // len(ids) + (i < clients % len(ids))
        members = rng.permutation(np.flatnonzero(groups == g))
        parts += [np.sort(p) for p in np.array_split(members, share)]
        owner += [int(g)] * share
    return parts, np.array(owner, np.int64)


def by_writer(writers, clients, min_size, rng):
    ids, counts = np.unique(writers, return_counts=True)
    enough = ids[counts >= min_size]
    chosen = enough if clients is None else np.sort(rng.choice(enough, clients, replace=False))
    return [np.flatnonzero(writers == w) for w in chosen], chosen.astype(np.int64)


def quantity(sizes, rng):
    """The end of `quantity`, of sizes that were drawn."""
    return [np.sort(p) for p in np.split(rng.permutation(int(sizes.sum())), np.cumsum(sizes)[:-1])]


def hold_out(parts, share, rng):
    undecided, trains, tests = range(3)
    side = np.full(1 + max((int(p.max()) for p in parts if len(p)), default=0), undecided, np.int8)
    train, test = [], []
    for k, part in enumerate(parts):
        unique = np.unique(part)
        if len(unique) < 2:
            raise ValueError(k)
        count = min(max(1, round(share * len(unique))), len(unique) - 1)
        free = unique[side[unique] == undecided]
        wanted = count - int((side[unique] == tests).sum())
        chosen = rng.choice(free, min(max(wanted, 0), len(free)), replace=False)
        side[free], side[chosen] = trains, tests
        held_out = unique[side[unique] == tests]
        if len(held_out) in (0, len(unique)):
            raise ValueError(k)
        train.append(part[side[part] == trains])
        test.append(held_out)
    return train, test


def matching_groups(ids, groups, size, rng):
    test = []
    for group in groups:
        members = np.flatnonzero(ids == group)
        test.append(members if size is None else np.sort(rng.choice(members, size, replace=False)))
    return test


def label_counts(parts, labels, num_classes):
    return np.stack([np.bincount(labels[p], minlength=num_classes) for p in parts])
