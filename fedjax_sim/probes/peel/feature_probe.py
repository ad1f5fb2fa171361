"""The layer-peeled probe: what a merge does to every layer's features, measured right after it.

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
    cdnv, discrimination                        see `fedjax_sim.probes.peel.moments`
    rank, stable_rank                           if asked for: of the pooled features about their class means
    pabs, pabs_centred                          mean cosine of the principal angles with the next kernel
    pabs_corrected                              pabs above what random subspaces have, 1 at most
    pabs_smallest, pabs_rank                    cosine of the largest angle; how many angles there are
    ncm, ridge                                  accuracy of probes fitted to the client's other samples
    shift_cka, shift_cosine                     without a state: 1 - similarity of after to before
    spread, update_cosine                       of the kernel, without a state; see `Probe.observe`

and, without a layer, `peel_accuracy` and `peel_loss` of start, before, after and controls, and
`peel_samples`; the instrument adds `peel_classes` and `peel_class_samples`. Controls are further states, see
`fedjax_sim.probes.peel.controls`. A number that its client's samples do not define (log_c of a single class;
pabs_corrected where the class means fill the whole space, as they do at the one channel of a grey image) has
no row; in its place stands one with the metric `undefined/<metric>` and value 1.

A convolution's feature is flattened for variances (as in the code of Rangamani et al., ICML 2023), averaged
over places for probes, ranks and CKA. A transformer's is averaged over its tokens throughout.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_sim.core.rng import PEEL, key_for
from fedjax_sim.engine.device_data import DeviceData
from fedjax_sim.engine.round import MergeView
from fedjax_sim.probes.peel import alignment, controls, linear_probes, moments
from fedjax_sim.probes.peel.clients import each_client
from fedjax_sim.probes.peel.forward import Forward, loop, pooled, zeros_like
from fedjax_sim.records import Row, make_row

STATES = ("before", "after")


@dataclasses.dataclass(frozen=True)
class Probe:
    """Measures rounds; the engine compiles it (`fedjax_sim.engine.observing.Observer`).

    Attributes:
      forward: the model on samples.
      mesh: devices, over which the measured clients are sharded.
      width: clients side by side on a device.
    """

    forward: Forward
    mesh: Mesh
    width: int

    def __post_init__(self):
        controls.check_controls(self.forward.config, self.forward.model)

    @property
    def states(self) -> tuple[str, ...]:
        """The S models of a client that are measured layer by layer: before, after, and the controls."""
        return STATES + self.forward.config.controls

    # --- on the devices ----------------------------------------------------------------------------

    def observe(self, view: MergeView, inputs: Any, data: DeviceData) -> dict[str, jax.Array]:
        """Everything that is measured; `by_name` takes it apart.

        Returns:
          figures: f32[m, S, L, F] by state, layer and figure.
          shifts: f32[m, S - 1, L, 2] of each later state against `before`.
          answers: f32[m, S + 1, 2], accuracy and loss of `start` and all states.
          pabs_cosines: f32[m, S, L, C].
          spread: f32[m, L], ‖w_k - w'_k‖ / ‖w'_k‖ of a layer's kernel before (w) and after (w') the merge.
          update_cosine: f32[m, L], the mean cosine of a client's update of the kernel with the other measured
            clients'.
        """
        key = key_for(view.key, PEEL, view.cohort.round)
        keys = jax.vmap(partial(jax.random.fold_in, key))(view.cohort.ids)
        models, own = (view.start, view.before, view.after), (inputs["fit"], inputs["measured"], keys)
        pools = {"train": data.train, "test": inputs["test"]}
        out = each_client(self.mesh, self._client, models, own, pools, width=self.width)
        return out | self._kernels(view)

    @property
    def _stacks(self) -> dict[str, tuple[str, ...]]:
        """The metrics in each array of `observe`, in order of its last axis."""
        ranks = RANKS if self.forward.config.ranks else ()
        return {"figures": EACH + ranks, "shifts": SHIFTS, "answers": ANSWERS}

    def by_name(self, out: dict[str, Any]) -> dict[str, Any]:
        """What `observe` returned by the metrics' names: [m, S, L], [m, S - 1, L], [m, S + 1] or [m, L]."""
        stacks = self._stacks
        found = {
            name: out[stack][..., place] for stack, own in stacks.items() for place, name in enumerate(own)
        }
        return found | {name: value for name, value in out.items() if name not in stacks}

    def _client(self, own, pools) -> dict[str, jax.Array]:
        """One client: the same without m.

        But for controls that run it too, the network stands once, in a loop over batches and in it over
        models. What follows is computed of all layers at once as far as their shapes allow it: written out,
        a deep network takes minutes to compile.
        """
        (start, before, after), (fit, measured, key) = own
        models = [before, after]
        for name in self.forward.config.controls:
            models.append(controls.make(name, self.forward, before, after, (fit, pools["train"]), key))
        models = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models, start)
        parts = [(fit, pools["train"]), (measured, pools["test"] or pools["train"])]
        sums, found, rows = self._seen(models, parts)
        answers = self._linear(rows, self.forward.labels(*parts[0]), self.forward.labels(*parts[1]))
        total = measured["count"].astype(jnp.float32)
        out = answers | {name: value / total for name, value in (sums | {"ridge": answers["ridge"]}).items()}
        out["cka"] = out["cka"].at[:, : self.forward.given].set(1)  # the same features, and not to rounding
        out["shift_cosine"], out["shift_cka"] = 1 - out["shift_cosine"][1:], 1 - out["cka"][1:]
        kernels = [leaf_at(models["params"], point.kernel) for point in self.forward.model.peel_points]
        angles = partial(self.angles, shapes=self.forward.shapes())
        out |= self._of_models(_class_figures, (found,)) | self._of_models(angles, (found, kernels))
        stacks = {stack: jnp.stack([out[name] for name in own], -1) for stack, own in self._stacks.items()}
        return stacks | {"pabs_cosines": out["pabs_cosines"]}

    def _of_models(self, one, trees):
        """`one` of every of the S models, one after another; leaves [S or more, …]."""
        pick = lambda number: jax.tree.map(lambda leaf: leaf[number], trees)  # noqa: E731
        return jax.lax.map(lambda number: one(*pick(number)), jnp.arange(len(self.states), dtype=jnp.int32))

    def _seen(self, models, parts):
        """The pass over the samples that probes are fitted to, and then over the measured ones.

        A model does there what is asked of it and no more: class means of the first part, answers alone of
        `start`. Features that are the samples' own (`Forward.given`) are looked at once for all models.

        Args:
          models: the S models and `start`, which sees the measured samples alone; leaves [S + 1, …].
          parts: (chosen, pool) of the one and of the other, see `Forward.collected`.

        Returns:
          Sums over the measured samples, f32[S + 1] with `start` first, and f32[S, L]; their class moments,
          leaves [S, …]; pooled features, f32[2, S, s, p_l] of both parts for every layer.
        """
        count, classes = len(self.states), self.forward.num_classes
        outer, inner = self.forward.layers.cut(self.forward.given)

        def measure(part, total, images, labels, mask):
            means_outer, means_inner = jax.tree.map(lambda leaf: leaf[0], total[2:])  # of the first part

            def right(guess):
                valid = mask.reshape(-1, *[1] * (guess.ndim - 1))
                here = labels.reshape(valid.shape)
                return ((guess == here) & valid).sum(0).astype(jnp.float32)

            def classed(flat, means, measured):
                """Right guesses of the nearest mean, and moments; of the first part the means alone."""
                if not flat:
                    return jnp.zeros(0), moments.empty(classes, ())
                if not measured:
                    return jnp.zeros(len(flat)), moments.means_of_batch(flat, labels, mask, classes)
                found = moments.of_batch(flat, labels, mask, classes)
                return right(moments.nearest_mean(means, flat)), found

            def one(first, number):
                model = jax.tree.map(lambda leaf: leaf[number], models)
                means = jax.tree.map(lambda leaf: leaf[jnp.minimum(number, count - 1)], means_inner)
                logits, features = self.forward.features(model, images)
                flat = [self.forward.flat(z) for z in features[self.forward.given :]]

                def of_fit(first):
                    hits, found = classed(flat, means, measured=False)
                    return first, jnp.stack([hits, hits]), found

                def of_measured(first):
                    hits, found = classed(flat, means, measured=True)
                    z = inner.join(flat)
                    new = z, inner.sums(z * z)
                    first = jax.lax.cond(number == 0, lambda: new, lambda: first)
                    cosines = _cosines(inner.sums(first[0] * z), first[1], new[1])
                    return first, jnp.stack([hits, jnp.where(mask[:, None], cosines, 0).sum(0)]), found

                def of_start(first):
                    return first, *zeros_like(jax.eval_shape(of_fit, first)[1:])

                kind = jnp.where(number == count, 2, part)
                first, sums, found = jax.lax.switch(kind, [of_fit, of_measured, of_start], first)
                loss = jnp.where(mask, _losses(logits, labels), 0).sum()
                answers = jnp.stack([loss, right(jnp.argmax(logits, -1))])
                return first, (answers, sums, found, [pooled(z) for z in features[self.forward.given :]])

            nothing = jnp.zeros((len(images), inner.size)), jnp.zeros((len(images), len(inner.widths)))
            answers, sums, found, rows = loop(one, nothing, count + part, count + 1)
            sums, found, rows = jax.tree.map(lambda leaf: leaf[:count], (sums, found, rows))
            features = self.forward.features(jax.tree.map(lambda leaf: leaf[0], models), images)[1]
            features = features[: self.forward.given]
            flat = [self.forward.flat(z) for z in features]
            hits, given = jax.lax.cond(
                part == 0,
                lambda: classed(flat, means_outer, measured=False),
                lambda: classed(flat, means_outer, measured=True),
            )
            same = jnp.stack([hits, jnp.full_like(hits, mask.sum().astype(jnp.float32))])
            same = jnp.broadcast_to(same, (count, *same.shape))
            rows = [jnp.broadcast_to(pooled(z), (count, *pooled(z).shape)) for z in features] + rows
            return (answers, jnp.concatenate([same, sums], 2), given, found), rows

        def merge(old, new):
            merged = moments.merge(old[2], new[2]), jax.vmap(moments.merge)(old[3], new[3])
            return old[0] + new[0], old[1] + new[1], *merged

        inside = moments.empty(classes, inner.widths)
        nothing = (
            jnp.zeros((count + 1, 2)),
            jnp.zeros((count, 2, len(self.forward.layers.widths))),
            moments.empty(classes, outer.widths),
            jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), inside),
        )
        total, rows = self.forward.collected(parts, measure, merge, nothing)
        answers, sums, given, found = jax.tree.map(lambda leaf: leaf[1], total)
        given = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), given)
        named = {"peel_loss": jnp.roll(answers[:, 0], 1), "peel_accuracy": jnp.roll(answers[:, 1], 1)}
        named |= {"ncm": sums[:, 0], "shift_cosine": sums[:, 1]}
        # Batches one after another.
        rows = [jax.lax.collapse(leaf.swapaxes(1, 2), 2, 4) for leaf in rows]
        return named, moments.side_by_side(given, found), rows

    def _linear(self, rows, fit, measured):
        """What linear probes and covariances of pooled features say of each layer of each model.

        Layers of similar width go together, filled up with zeros to the widest of them: a feature that is 0
        for every sample changes nothing of what `fedjax_sim.probes.peel.linear_probes` says.

        Args:
          rows: pooled features of the samples that probes are fitted to, and of the measured ones,
            f32[2, S, s, p_l] of every layer.
          fit: labels i32[s] of the first, and bool[s], False for padding.
          measured: labels and mask of the second.

        Returns:
          f32[S, L]: `ridge`, samples that the probe gets right; `cka` with the first model; the ranks.
        """
        target = jax.nn.one_hot(fit[0], self.forward.num_classes)
        labels, mask = measured
        member = jax.nn.one_hot(labels, self.forward.num_classes) * mask.astype(jnp.float32)[:, None]

        def of_layer(own):
            fitted, seen = own

            def one(pair):
                old, new = pair
                guess = jnp.argmax(linear_probes.ridge_scores(old, target, fit[1], new), 1)
                hits = ((guess == labels) & mask).sum().astype(jnp.float32)
                out = [hits]
                if self.forward.config.ranks:
                    means = _product(member.T, new) / jnp.maximum(member.sum(0), 1)[:, None]
                    away = (new - means[labels]) * mask.astype(jnp.float32)[:, None]
                    out += linear_probes.ranks(away)
                return jnp.stack(out)

            similar = linear_probes.linear_cka(seen, mask)
            return jnp.concatenate([similar[:, None], jax.lax.map(one, (fitted, seen))], 1)

        figures = [jnp.zeros(())] * len(rows)
        for places in alike([leaf.shape[-1] for leaf in rows]):
            widest = max(rows[place].shape[-1] for place in places)
            fill = lambda leaf, wide=widest: jnp.pad(leaf, [(0, 0)] * 3 + [(0, wide - leaf.shape[-1])])  # noqa: E731
            found = jax.lax.map(of_layer, jnp.stack([fill(rows[place]) for place in places]))
            for place, own in zip(places, found, strict=True):
                figures[place] = own  # [S, …]
        names = ("cka", "ridge", *(RANKS if self.forward.config.ranks else ()))
        return dict(zip(names, jnp.stack(figures, 1).transpose(2, 0, 1), strict=True))

    def angles(self, m: moments.Moments, kernels: Any, shapes: Any) -> dict[str, jax.Array]:
        """The `pabs` family of some layers: their kernels against the class means of their inputs.

        Args:
          m: class moments of the layers' inputs.
          kernels: of the layers, f32[d, F] or f32[kh, kw, C, F].
          shapes: of one sample's input of each layer, see `Forward.shapes`.

        Returns:
          f32[L] each; `pabs_cosines` f32[L, C].
        """
        most, share = self.forward.num_classes, m.count / jnp.maximum(m.count.sum(), 1)
        weights = [alignment.kernel_basis(kernel, most) for kernel in kernels]

        def against(means):
            parts = zip(weights, m.layers.split(means), shapes, strict=True)
            matrices = ((own, part.reshape(most, *shape)) for own, part, shape in parts)
            overlaps = [
                alignment.overlap(own, alignment.basis(alignment.means_matrix(maps)), most)
                for own, maps in matrices
            ]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *overlaps)

        both = jnp.stack([m.mean, m.mean - _product(share[None], m.mean)])
        product, values = jax.lax.map(against, jnp.where(m.present[None, :, None], both, 0))
        present = m.present.sum().astype(jnp.int32)
        found, r = alignment.cosines(product, values, jnp.stack([present, present - 1])[:, None])
        mean = jnp.where(r > 0, found.sum(2) / r.astype(jnp.float32), jnp.nan)
        smallest = jnp.take_along_axis(found[0], jnp.maximum(r[0][:, None] - 1, 0), 1)[:, 0]
        return {
            "pabs": mean[0],
            "pabs_rank": r[0].astype(jnp.float32),
            "pabs_cosines": found[0],
            "pabs_smallest": jnp.where(r[0] > 0, smallest, jnp.nan),
            "pabs_centred": mean[1],
        }

    def _kernels(self, view: MergeView) -> dict[str, jax.Array]:
        """Of the layers' kernels: spread and agreement of updates, f32[m, L] each."""
        gaps, sizes, products = [], [], []
        for point in self.forward.model.peel_points:
            start, before, after = (
                leaf_at(tree["params"], point.kernel).astype(jnp.float32)
                for tree in (view.start, view.before, view.after)
            )
            flat = lambda a: a.reshape(len(a), -1)  # noqa: E731
            gaps.append((flat(before - after) ** 2).sum(1))
            sizes.append((flat(after) ** 2).sum(1))
            # Whole on every device: of one layer after another, and of no other figure.
            update = jax.lax.with_sharding_constraint(flat(before - start), P())
            products.append(_product(update, update.T))
        products = jax.lax.with_sharding_constraint(jnp.stack(products), P())
        size = jnp.sqrt(jnp.diagonal(products, axis1=1, axis2=2))
        cosines = products / (size[:, None] * size[:, :, None])
        others = cosines.sum(2) - jnp.diagonal(cosines, axis1=1, axis2=2)
        count = others.shape[1]
        agreement = others / (count - 1) if count > 1 else jnp.full_like(others, jnp.nan)
        return {"spread": jnp.sqrt(jnp.stack(gaps, 1) / jnp.stack(sizes, 1)), "update_cosine": agreement.T}

    # --- on the host --------------------------------------------------------------------------------

    def rows(self, number: int, ids: np.ndarray, out: dict[str, np.ndarray], counts: np.ndarray) -> list[Row]:
        """The tidy rows of a round.

        Args:
          number: of the round, from 1.
          ids: i32[m], the clients that were looked at.
          out: what `observe` returned.
          counts: i32[m], samples that were measured of each.
        """
        made: list[Row] = []
        out = self.by_name(out)
        layers = [point.name for point in self.forward.model.peel_points]
        widths = [shape[-1] for shape in self.forward.shapes()]

        def add(metric, value, **where):
            made.append(make_row(number, metric, value, **where))

        for place, client in enumerate(ids.tolist()):
            nothing = counts[place] == 0  # was measured: nothing is defined but what weights alone say
            for name in ANSWERS:
                for state, value in zip(("start", *self.states), out[name][place], strict=True):
                    add(name, value, client=client, state=state)
            add("peel_samples", counts[place], client=client)
            for layer, name in enumerate(layers):
                for metric in KERNELS:
                    add(metric, out[metric][place, layer], layer=name, client=client)
                for s, state in enumerate(self.states):
                    where = dict(layer=name, client=client, state=state)
                    for metric in SHIFTS if s else ():
                        value = np.nan if nothing else out[metric][place, s - 1, layer]
                        of = "" if state == "after" else state
                        add(metric, value, layer=name, client=client, state=of)
                    for metric in self._stacks["figures"]:
                        add(metric, np.nan if nothing else out[metric][place, s, layer], **where)
                    pabs, r = out["pabs"][place, s, layer], int(out["pabs_rank"][place, s, layer])
                    add("pabs_corrected", alignment.corrected(float(pabs), widths[layer], r), **where)
                    if self.forward.config.angles:
                        for angle in range(r):
                            add(
                                f"pabs_cosine_{angle + 1}",
                                out["pabs_cosines"][place, s, layer, angle],
                                **where,
                            )
        return made


ANSWERS = ("peel_accuracy", "peel_loss")
SHIFTS = ("shift_cka", "shift_cosine")
KERNELS = ("spread", "update_cosine")
EACH = (
    "trace_within", "trace_between", "trace_total", "sigma_within", "sigma_between", "log_c",
    "log_c_balanced", "cdnv", "discrimination", "pabs", "pabs_centred", "pabs_smallest", "pabs_rank",
    "ncm", "ridge",
)  # fmt: skip
RANKS = ("rank", "stable_rank")


def _class_figures(m: moments.Moments) -> dict[str, jax.Array]:
    """What class moments of a model say, f32[L] each."""
    traces = moments.both_traces(m)
    (within, _), (between, _), (total, _) = traces
    log_c, balanced = jnp.log(traces.within / traces.between)
    return {
        "trace_within": within,
        "trace_between": between,
        "trace_total": total,
        "sigma_within": within / total,
        "sigma_between": between / total,
        "log_c": log_c,
        "log_c_balanced": balanced,
        "cdnv": moments.cdnv(m),
        "discrimination": moments.discrimination(m),
    }


def _losses(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _cosines(product: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Of ⟨a, b⟩, ‖a‖² and ‖b‖²; 1 where both are zero, 0 where one is. f32[B, L] each, and so returned."""
    scale = jnp.sqrt(a * b)
    cosine = product / jnp.where(scale > 0, scale, 1)
    return jnp.where(scale > 0, cosine, ((a == 0) & (b == 0)).astype(jnp.float32))


def alike(widths: Sequence[int]) -> list[list[int]]:
    """Places of widths that are within a factor of four of each other, by powers of four."""
    groups: dict[int, list[int]] = {}
    for place, width in enumerate(widths):
        groups.setdefault(-(-(max(width, 16) - 1).bit_length() // 2), []).append(place)
    return list(groups.values())


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def leaf_at(tree: Any, path: tuple[str, ...]) -> Any:
    """What lies at a path of a nested mapping."""
    for key in path:
        tree = tree[key]
    return tree
