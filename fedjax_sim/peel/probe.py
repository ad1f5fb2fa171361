"""The layer-peeled probe: what a merge does to every layer's features, measured inside the round.

For some clients of a measured round it takes the model that the client trained (`before`) and what the
client holds once merged (`after`), runs both on the same samples of the client's own, and peels off the
features at each of the model's peel points, the inputs of its weight layers. That features are compared
before and after aggregation by class variances, by their alignment with the next weights and by linear
probes is FOUND of "The Other Side of the Coin: Unveiling the Downsides of Model Aggregation in Federated
Learning from a Layer-peeled Perspective" (arXiv 2502.03231); formulas, samples and pooling are not, and are
OUR CHOICE where a function's docstring names no other source.

One row a (client, layer, state, metric), layer being the name of the weight layer that reads the feature:

    trace_within, trace_between, trace_total    of the class covariances; the first two add up to the third
    sigma_within, sigma_between                 the first two over the third
    log_c                                       log(trace_within / trace_between)
    log_c_balanced                              the same with every present class weighing alike
    cdnv, discrimination                        see `fedjax_sim.peel.moments`
    rank, stable_rank                           if asked for: of the pooled features about their class means
    pabs, pabs_centred                          mean cosine of the principal angles with the next kernel
    pabs_corrected                              pabs above what random subspaces have, 1 at most
    pabs_smallest, pabs_rank                    cosine of the largest angle; how many angles there are
    ncm, ridge                                  accuracy of probes fitted to the client's other samples
    shift_cka, shift_cosine                     without a state: 1 - similarity of after to before
    spread, update_cosine                       of the kernel, without a state; see `Probe.observe`

and, without a layer, `peel_accuracy` and `peel_loss` of start, before, after and controls, and
`peel_samples`. Controls are further states, see `fedjax_sim.peel.controls`. A number that its client's
samples do not define (log_c of a single class, say) has no row; in its place stands one with the metric
`undefined/<metric>` and value 1.

A convolution's feature is flattened for variances (as in the code of Rangamani et al., ICML 2023), averaged
over places for probes, ranks and CKA. A transformer's is averaged over its tokens throughout.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim.peel import alignment, controls, moments, probing
from fedjax_sim.peel.forward import Forward, pooled, tidy
from fedjax_sim.records import Row
from fedjax_sim.rounds import Witness
from fedjax_sim.stacked import AXIS
from fedjax_sim.streams import PEEL, stream
from fedjax_sim.training import Shard

STATES = ("before", "after")


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """Measures rounds; the engine compiles it into them.

    Attributes:
      forward: the model on samples.
      mesh: devices, over which the measured clients are sharded.
      width: clients side by side on a device.
    """

    forward: Forward
    mesh: Mesh
    width: int

    def __post_init__(self):
        controls.check(self.forward.config, self.forward.model)

    @property
    def states(self) -> tuple[str, ...]:
        """The S models of a client that are measured layer by layer: before, after, and the controls."""
        return STATES + self.forward.config.controls

    # --- inside the round ---------------------------------------------------------------------------

    def observe(self, witness: Witness, given: Any, shard: Shard) -> dict[str, jax.Array]:
        """Everything that is measured, by name.

        f32[m, S, L] by state and layer; f32[m, S - 1, L] of each later state against `before`; f32[m, S + 1]
        of `start` and all states; f32[m, L] of the kernels. `spread` is ‖w_k - w'_k‖ / ‖w'_k‖ of a layer's
        kernel before (w) and after (w') the merge; `update_cosine` the mean cosine of a client's update of
        the kernel with the other measured clients'.
        """
        count = len(witness.cohort.ids)
        spare = -count % self.mesh.size
        key = stream(witness.key, PEEL, witness.cohort.round)
        keys = jax.vmap(partial(jax.random.fold_in, key))(witness.cohort.ids)
        own = (witness.start, witness.before, witness.after, given["fit"], given["measured"], keys)
        own = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1].repeat(spare, 0)]), own)

        train = {"images": shard.images, "labels": shard.labels}
        pools = {"fit": train, "measured": given["test"] or train}

        def share(own, pools):
            width = None if self.width == 1 else self.width
            return jax.lax.map(lambda one: self._client(one, pools), own, batch_size=width)

        run = jax.shard_map(
            share, mesh=self.mesh, in_specs=(P(AXIS), P()), out_specs=P(AXIS), check_vma=False
        )
        out = jax.tree.map(lambda leaf: leaf[:count], run(own, pools))
        return out | self._kernels(witness)

    def _client(self, own, pools) -> dict[str, jax.Array]:
        """One client: the same without m."""
        start, before, after, fit, measured, key = own
        models = [before, after]
        for name in self.forward.config.controls:
            models.append(controls.make(name, self.forward, before, after, (fit, pools["fit"]), key))
        learnt = self._fitted(models, fit, pools["fit"])
        sums, classes, pairs = self._seen(start, models, learnt, measured, pools["measured"])

        total = jnp.maximum(measured["count"], 1).astype(jnp.float32)
        out = {name: value / total for name, value in sums.items()}
        out["shift_cosine"] = 1 - out["shift_cosine"]
        out["shift_cka"] = jnp.stack([jnp.stack([1 - probing.linear_cka(c) for c in own]) for own in pairs])
        figures = []
        for s, model in enumerate(models):
            # Pooled features' covariance: the first of a pair is always `before`.
            covariances = [c.yy for c in pairs[s - 1]] if s else [c.xx for c in pairs[0]]
            points = zip(self.forward.model.peel_points, self.forward.shapes(), strict=True)
            figures.append(
                [
                    self._figures(moment, covariance, point, model, shape)
                    for moment, covariance, (point, shape) in zip(
                        classes[s], covariances, points, strict=True
                    )
                ]
            )
        for name in figures[0][0]:
            out[name] = jnp.stack([jnp.stack([one[name] for one in own]) for own in figures])
        return out

    def _fitted(self, models, fit, pool):
        """What probes are made of, a pair for each model and layer: (Ridge, Moments)."""

        def measure(images, labels, mask):
            target = jax.nn.one_hot(labels, self.forward.num_classes)
            return [
                [
                    (probing.of_batch(pooled(z), target, mask), self.forward.moments(z, labels, mask))
                    for z in self.forward.features(model, images)[1]
                ]
                for model in models
            ]

        learnt = self.forward.over(fit, pool, measure, _merged)
        return [[(probing.ridge(linear), means) for linear, means in own] for own in learnt]

    def _seen(self, start, models, learnt, measured, pool):
        """The pass over the measured samples: sums over them, class moments [S][L], pairs [S - 1][L]."""
        layers = range(len(self.forward.model.peel_points))

        def measure(images, labels, mask):
            seen = [self.forward.features(model, images) for model in models]
            logits = [self.forward.model.apply(start, images)[0], *(own for own, _ in seen)]
            features = [own for _, own in seen]

            def right(guess):
                return ((guess == labels) & mask).sum().astype(jnp.float32)

            def by_ridge(s, layer):
                return right(probing.predict(learnt[s][layer][0], pooled(features[s][layer])))

            def by_mean(s, layer):
                return right(moments.nearest_mean(learnt[s][layer][1], self.forward.flat(features[s][layer])))

            def alike(s, layer):
                old, new = (self.forward.flat(features[place][layer]) for place in (0, s))
                return jnp.where(mask, _cosine(old, new), 0).sum()

            every, later = range(len(models)), range(1, len(models))
            sums = {
                "peel_loss": jnp.stack([jnp.where(mask, _losses(out, labels), 0).sum() for out in logits]),
                "peel_accuracy": jnp.stack([right(jnp.argmax(out, -1)) for out in logits]),
                "ridge": _table(by_ridge, every, layers),
                "ncm": _table(by_mean, every, layers),
                "shift_cosine": _table(alike, later, layers),
            }
            classes = [[self.forward.moments(z, labels, mask) for z in own] for own in features]
            pairs = [
                [
                    probing.of_batch(pooled(x), pooled(y), mask)
                    for x, y in zip(features[0], features[s], strict=True)
                ]
                for s in later
            ]
            return sums, classes, pairs

        return self.forward.over(measured, pool, measure, _merged)

    def _figures(self, m: moments.Moments, covariance, point, variables, shape) -> dict[str, jax.Array]:
        """What one layer's features of one model say."""
        plain, even = moments.traces(m), moments.traces(m, balanced=True)
        out = {
            "trace_within": plain.within,
            "trace_between": plain.between,
            "trace_total": plain.total,
            "sigma_within": plain.within / plain.total,
            "sigma_between": plain.between / plain.total,
            "log_c": jnp.log(plain.within / plain.between),
            "log_c_balanced": jnp.log(even.within / even.between),
            "cdnv": moments.cdnv(m),
            "discrimination": moments.discrimination(m),
        }
        maps = m.mean.reshape(self.forward.num_classes, *shape)
        share = m.count / jnp.maximum(m.count.sum(), 1)
        if self.forward.config.ranks:
            centres = pooled(maps)
            away = (centres - (share @ centres)[None]) * jnp.sqrt(m.count)[:, None]
            out["rank"], out["stable_rank"] = probing.ranks(covariance - away.T @ away)

        present = (m.count > 0).reshape(-1, *[1] * len(shape))
        classes = present.sum().astype(jnp.int32)
        centre = jnp.tensordot(share, maps, 1)
        weights = alignment.basis(alignment.kernel_matrix(_leaf(variables["params"], point.kernel)))
        for suffix, means, wanted in (("", maps, classes), ("_centred", maps - centre[None], classes - 1)):
            found = alignment.basis(alignment.means_matrix(jnp.where(present, means, 0)))
            cosines, r = alignment.cosines(weights, found, wanted, self.forward.num_classes)
            cosines = jnp.pad(cosines, (0, self.forward.num_classes - len(cosines)))
            size = r.astype(jnp.float32)
            out["pabs" + suffix] = cosines.sum() / size
            out["pabs_rank" + suffix] = size
            if not suffix:
                out["pabs_smallest"] = jnp.where(r > 0, cosines[jnp.maximum(r - 1, 0)], jnp.nan)
                out["pabs_cosines"] = cosines
        return out

    def _kernels(self, witness: Witness) -> dict[str, jax.Array]:
        """Of the layers' kernels: spread and agreement of updates, f32[m, L] each."""
        spread, agreement = [], []
        for point in self.forward.model.peel_points:
            start, before, after = (
                _leaf(tree["params"], point.kernel).astype(jnp.float32)
                for tree in (witness.start, witness.before, witness.after)
            )
            norm = lambda a: jnp.sqrt((a * a).reshape(len(a), -1).sum(1))  # noqa: E731
            spread.append(norm(before - after) / norm(after))
            update = (before - start).reshape(len(start), -1)
            size = norm(update)
            cosine = jnp.matmul(update, update.T, precision=jax.lax.Precision.HIGHEST) / (
                size[None] * size[:, None]
            )
            others = cosine.sum(1) - jnp.diagonal(cosine)
            agreement.append(others / (len(start) - 1) if len(start) > 1 else jnp.full_like(others, jnp.nan))
        return {"spread": jnp.stack(spread, 1), "update_cosine": jnp.stack(agreement, 1)}

    # --- on the host --------------------------------------------------------------------------------

    def rows(self, number: int, ids: np.ndarray, out: dict[str, np.ndarray], counts: np.ndarray) -> list[Row]:
        """The tidy rows of round `number`, from what `observe` returned for the clients `ids`.

        counts: i32[m], samples that were measured of each.
        """
        made: list[Row] = []
        layers = [point.name for point in self.forward.model.peel_points]
        widths = [shape[-1] for shape in self.forward.shapes()]

        def add(metric, value, **where):
            made.append(tidy(number, metric, value, **where))

        for place, client in enumerate(ids.tolist()):
            for name in ("peel_accuracy", "peel_loss"):
                for state, value in zip(("start", *self.states), out[name][place], strict=True):
                    add(name, value, client=client, state=state)
            add("peel_samples", counts[place], client=client)
            for layer, name in enumerate(layers):
                for metric in KERNELS:
                    add(metric, out[metric][place, layer], layer=name, client=client)
                for s, state in enumerate(self.states):
                    where = dict(layer=name, client=client, state=state)
                    for metric in SHIFTS if s else ():
                        of = "" if state == "after" else state
                        add(metric, out[metric][place, s - 1, layer], layer=name, client=client, state=of)
                    for metric in EACH + RANKS * self.forward.config.ranks:
                        add(metric, out[metric][place, s, layer], **where)
                    pabs, r = out["pabs"][place, s, layer], int(out["pabs_rank"][place, s, layer])
                    add(
                        "pabs_corrected",
                        alignment.corrected(float(pabs), widths[layer], r) if r else np.nan,
                        **where,
                    )
                    if self.forward.config.angles:
                        for angle in range(r):
                            add(
                                f"pabs_cosine_{angle + 1}",
                                out["pabs_cosines"][place, s, layer, angle],
                                **where,
                            )
        return made


SHIFTS = ("shift_cka", "shift_cosine")
KERNELS = ("spread", "update_cosine")
EACH = (
    "trace_within", "trace_between", "trace_total", "sigma_within", "sigma_between", "log_c",
    "log_c_balanced", "cdnv", "discrimination", "pabs", "pabs_centred", "pabs_smallest", "pabs_rank",
    "ncm", "ridge",
)  # fmt: skip
RANKS = ("rank", "stable_rank")


def _merged(old, new):
    """Measurements of two batches together: moments by their rules, plain arrays by addition."""
    rules = {moments.Moments: moments.merge, probing.Comoments: probing.merge}
    is_one = lambda node: type(node) in rules  # noqa: E731
    return jax.tree.map(lambda a, b: rules.get(type(a), jnp.add)(a, b), old, new, is_leaf=is_one)


def _table(value, states, layers):
    return jnp.stack([jnp.stack([value(s, layer) for layer in layers]) for s in states])


def _losses(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _cosine(a, b):
    """Of rows; 1 where both are zero, 0 where one is. f32[B, d] twice -> f32[B]."""
    square = [(v * v).sum(1) for v in (a, b)]
    scale = jnp.sqrt(square[0] * square[1])
    cosine = (a * b).sum(1) / jnp.where(scale > 0, scale, 1)
    return jnp.where(scale > 0, cosine, ((square[0] == 0) & (square[1] == 0)).astype(a.dtype))


def _leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree
