"""FedGen: clients' and the server's losses by hand, what the generator learns, and what is never drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms import FedAvg, FedGen, fedgen
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.task import Batch, Training, differentiated
from fedjax_sim.data import Partition
from tests import oracles
from tests.algorithms import by_hand, personal
from tests.algorithms.families import WIDE_OR_SINGLE

SIZES = (12, 7, 20, 3, 31)


def simulate(algorithm, **keywords):
    settings = {"model": personal.deep(), "cohort": 3, **keywords}
    return oracles.simulate(settings.pop("sizes", SIZES), algorithm=algorithm, **settings)


# Worlds with classes of which nobody has a sample are meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.* classes have no training sample:UserWarning")


def one_class(sizes, label):
    """A world of 3 classes all of whose training samples are of one."""
    dataset, partition = oracles.world(sizes)
    labels = np.full_like(dataset.train_labels, label)
    return dataclasses.replace(dataset, train_labels=labels), partition


def noiseless(variables):
    """The generator's variables with no weight on its noise: every sample of a class is the same."""
    variables = jax.device_get(variables)
    kernel = variables["params"]["Dense_0"]["kernel"]
    kernel = np.concatenate([kernel[:-100], np.zeros((100, kernel.shape[1]), np.float32)])
    params = {**variables["params"], "Dense_0": {**variables["params"]["Dense_0"], "kernel": kernel}}
    return {**variables, "params": params}


def with_generator(simulation, seen=None):
    """The simulation with such a generator, and perhaps other samples shown. -> its variables."""
    state = jax.device_get(simulation.state)
    generator = noiseless(state.algorithm.generator)
    inner = state.algorithm.replace(generator=generator)
    if seen is not None:
        inner = inner.replace(seen=np.asarray(seen, np.float32))
    simulation.restore(dataclasses.replace(state, algorithm=inner), simulation.round)
    return generator


def generated(variables, classes, train=False):
    """What a noiseless generator makes of one-hot labels, by hand. -> f64[len(classes), width]."""
    first, norm, last = (
        oracles.doubled(variables["params"][n]) for n in ("Dense_0", "BatchNorm_0", "Dense_1")
    )
    x = first["kernel"][list(classes)] + first["bias"]
    old = oracles.doubled(variables["batch_stats"]["BatchNorm_0"])
    mean, var = (x.mean(0), x.var(0)) if train else (old["mean"], old["var"])
    x = (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    return np.maximum(x, 0) @ last["kernel"] + last["bias"]


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def client_gradient(params, x, y, a, b, made, known):
    """CE(h(z), y) + a CE(h(G(known)), known) + b KL(h(G(y)) ‖ h(z)). -> (loss, gradient)."""
    loss, g = oracles.mlp_gradient(params, x, y)
    logits, inputs = oracles.mlp(params, x)
    student, teacher = softmax(logits), softmax(dense(params["fc3"], made[y]))
    loss += b * (teacher * np.log(teacher / student)).sum(1).mean()
    # The divergence's gradient by the logits, brought back as the cross-entropy's is.
    delta = b * (student - teacher) / len(y)
    for depth in (3, 2, 1):
        name = f"fc{depth}"
        here = {"kernel": inputs[depth - 1].T @ delta, "bias": delta.sum(0)}
        delta = (delta @ params[name]["kernel"].T) * (inputs[depth - 1] > 0)
        g = {**g, name: by_hand.plus(g[name], here)}
    guess = softmax(dense(params["fc3"], made[known]))
    loss -= a * np.log(guess[known])
    guess[known] -= 1
    here = {"kernel": np.outer(made[known], guess), "bias": guess}
    return loss, {**g, "fc3": by_hand.plus(g["fc3"], here, a)}


# --- clients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", WIDE_OR_SINGLE)
def test_a_clients_round_is_numpys(layout):
    """Given a generator without noise and one class to draw, nothing is left to chance."""
    simulation = simulate(FedGen(a=0.7, b=1.5, generator_steps=1), momentum=0.5, rounds=2, **layout)
    oracles.run(simulation, 1)
    made = generated(with_generator(simulation, seen=[0, 9, 0]), range(3))
    x = oracles.doubled(simulation.variables["params"])
    local, trained, losses = simulation.setup.config.local, [], []
    ids = by_hand.cohort(simulation, 1)
    for client in ids:
        w, memory, total = x, oracles.map_trees(np.zeros_like, x), 0.0
        for images, y in by_hand.batches(simulation, 1, client):
            loss, g = client_gradient(w, images, y, 0.7, 1.5, made, known=1)
            memory = by_hand.plus(g, memory, local.momentum)
            w, total = by_hand.plus(w, memory, -local.lr), total + loss * len(y)
        trained.append(w)
        losses.append(total)
    sizes = oracles.sizes_of(simulation)[ids]
    rows = oracles.run(simulation)
    oracles.assert_trees_close(simulation.variables["params"], oracles.weighted_mean(trained, sizes))
    expected = sum(losses) / sizes.sum() / local.epochs
    np.testing.assert_allclose(oracles.value_of(rows, "train_loss", 2), expected, rtol=1e-5)
    plain, _ = oracles.fedavg_round(x, simulation, 1)
    assert oracles.far_apart(simulation.variables["params"], plain) > 1e-2


def test_classes_that_nobody_has_shown_are_never_drawn():
    """The loss of single draws takes the values of the two known classes, both often, and no other."""
    simulation = simulate(FedGen(a=1.0, b=0.0))
    generator = with_generator(simulation)
    made = generated(generator, range(3))
    variables = simulation.variables
    head = oracles.doubled(variables["params"]["fc3"])
    possible = oracles.cross_entropies(dense(head, made), np.arange(3))
    rule, setup = simulation.setup.algorithm.local, simulation.setup
    images = setup.dataset.train_images[:1] / np.float32(255)
    labels = setup.dataset.train_labels[:1]

    def told(key):
        sent = fedgen.Sent(generator, jnp.float32([1, 0, 1]))
        batch = Batch(oracles.examples(jnp.asarray(images), jnp.asarray(labels)), None, key)
        extra = rule.start_round(variables, None, sent)
        apply = Training(setup.model, setup.task)
        value = rule.gradient(differentiated(apply), variables, batch, extra).loss
        logits, _ = apply(variables, batch)
        return value, logits

    values, logits = jax.jit(jax.vmap(told))(jax.random.split(jax.random.key(3), 200))
    values = np.asarray(values, np.float64) - oracles.cross_entropies(
        np.asarray(logits)[:, 0], labels.repeat(200)
    )
    near = np.abs(values[:, None] - possible[None]) < 1e-4
    assert near.any(1).all() and np.abs(np.diff(np.sort(possible))).min() > 1e-3
    np.testing.assert_array_equal(near.sum(0)[1], 0)
    assert 70 < near.sum(0)[0] < 130


@pytest.mark.slow
def test_without_weights_it_is_fedavg_and_so_is_its_first_round():
    plain = simulate(FedAvg(), momentum=0.5, rounds=2)
    oracles.run(plain, 1)
    first = jax.device_get(plain.variables)
    oracles.run(plain)
    idle = simulate(FedGen(a=0.0, b=0.0, generator_steps=2), momentum=0.5, rounds=2)
    oracles.run(idle)
    oracles.assert_trees_close(idle.variables, plain.variables, rtol=1e-6, atol=1e-7)
    eager = simulate(FedGen(a=9.0, b=9.0, generator_steps=2), momentum=0.5, rounds=2)
    oracles.run(eager, 1)
    oracles.assert_trees_close(eager.variables, first, rtol=1e-6, atol=1e-7)
    oracles.run(eager)
    assert oracles.far_apart(eager.variables, plain.variables) > 1e-2


# --- server ---------------------------------------------------------------------------------------------


def test_the_servers_loss_by_hand():
    """One class: every sample is normalised away, each head weighs by its share, nothing is diverse."""
    given = one_class((6, 11, 3), 2)
    simulation = simulate(
        FedGen(diversity=0.5, generator_steps=1, generator_lr=1e-3), given=given, rounds=2, epochs=1
    )
    generator = with_generator(simulation)
    bias = oracles.doubled(generator["params"])["BatchNorm_0"]["bias"]
    made = dense(oracles.doubled(generator["params"])["Dense_1"], np.maximum(bias, 0))
    start = oracles.doubled(simulation.variables["params"])
    ids, trained, _ = oracles.train_cohort([start] * 3, simulation, 0)
    losses = [oracles.cross_entropies(dense(m["fc3"], made)[None], np.array([2]))[0] for m in trained]
    sizes = oracles.sizes_of(simulation)[ids]
    rows = oracles.run(simulation, 1)
    expected = np.average(losses, weights=sizes) + 0.5
    np.testing.assert_allclose(oracles.value_of(rows, "generator_loss", 1), expected, rtol=1e-5)
    assert abs(np.average(losses) - np.average(losses, weights=sizes)) > 1e-3
    # A fresh Adam's first step is its rate; so is that of the second round, whatever was before.
    for _ in range(2):
        before = oracles.doubled(generator["params"]["Dense_1"]["bias"])
        after = oracles.doubled(simulation.state.algorithm.generator["params"]["Dense_1"]["bias"])
        np.testing.assert_allclose(np.abs(after - before), 1e-3, rtol=1e-3)
        generator = jax.device_get(simulation.state.algorithm.generator)
        if simulation.round < 2:
            oracles.run(simulation)
    np.testing.assert_array_equal(np.asarray(simulation.state.algorithm.seen), [0, 0, 2 * sizes.sum()])


def test_every_label_is_taught_by_those_who_have_it():
    """Two classes, each with one client; 4096 labels, half of each up to chance."""
    dataset, _ = oracles.world((40,))
    labels = np.repeat(np.array([0, 2], np.int32), 20)
    given = (
        dataclasses.replace(dataset, train_labels=labels),
        Partition((np.arange(20), np.arange(20, 40))),
    )
    simulation = simulate(
        FedGen(generator_steps=1, generator_batch=4096), given=given, cohort=2, rounds=1, epochs=8, lr=0.3
    )
    made = generated(with_generator(simulation), (0, 2), train=True)
    start = oracles.doubled(simulation.variables["params"])
    ids, trained, _ = oracles.train_cohort([start] * 2, simulation, 0)
    heads = dict(zip(ids, trained, strict=True))
    taught = [
        oracles.cross_entropies(dense(heads[k]["fc3"], made[k][None]), np.array([label]))[0]
        for k, label in ((0, 0), (1, 2))
    ]
    # Uniform noise: a mean square of differences of 1/6; half of all pairs are of different classes.
    diverse = np.exp(-np.abs(made[0] - made[1]).mean() / 12)
    rows = oracles.run(simulation)
    got = oracles.value_of(rows, "generator_loss", 1)
    np.testing.assert_allclose(got, np.mean(taught) + diverse, rtol=0.02)
    others = [
        oracles.cross_entropies(dense(heads[1 - k]["fc3"], made[k][None]), np.array([label]))[0]
        for k, label in ((0, 0), (1, 2))
    ]
    assert abs(np.mean(others) - np.mean(taught)) > 0.2  # heads in the wrong place would show


def test_diversity_is_its_formula(rng):
    noise, made = rng.random((7, 100)).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)
    total = 0.0
    for i in range(7):
        for j in range(7):
            total += ((noise[i] - noise[j]) ** 2).mean() * np.abs(made[i] - made[j]).mean()
    np.testing.assert_allclose(fedgen._diversity(noise, made), np.exp(-total / 49), rtol=1e-5)


def test_the_generator_learns_what_the_classes_look_like():
    """Its loss falls, and the deployed head comes to know what it makes, as it did not before."""
    simulation = simulate(
        FedGen(generator_lr=1e-3, generator_steps=8, generator_batch=32),
        sizes=(30, 40, 35),
        rounds=5,
        lr=0.05,
        epochs=4,
    )
    model = simulation.setup.model
    labels = np.arange(3).repeat(30)
    noise = np.random.default_rng(0).random((90, 100)).astype(np.float32)

    def known():
        generator = fedgen.Generator(4)
        made = generator.apply(simulation.state.algorithm.generator, jax.nn.one_hot(labels, 3), noise)
        head = oracles.doubled(model.head(simulation.variables))
        return np.mean(dense(head, np.asarray(made)).argmax(1) == labels)

    assert known() < 0.5
    rows = oracles.run(simulation)
    losses = [oracles.value_of(rows, "generator_loss", number) for number in range(1, 6)]
    assert losses[-1] < losses[0] - 0.2 and known() > 0.9


def test_a_round_without_anyone_teaches_nothing():
    simulation = simulate(
        FedGen(generator_steps=2), sizes=(5, 8), cohort=2, epochs=1, non_finite="skip",
        weight_decay=1e3, lr=1e-4,
    )  # fmt: skip
    oracles.run(simulation, 1)
    before = jax.device_get(simulation.state.algorithm)
    state, included = by_hand.overflowing(simulation)
    assert not included.any()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.algorithm), before)


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"a": -1}, "a"),
        ({"b": float("inf")}, "b"),
        ({"diversity": -0.5}, "diversity"),
        ({"generator_lr": 0}, "generator_lr"),
        ({"generator_decay": -1e-3}, "generator_decay"),
        ({"generator_steps": 0}, "generator_steps"),
        ({"generator_batch": 1}, "generator_batch"),
        ({"weights": "even"}, "weights"),
    ],
)
def test_mistakes_are_named(settings, field):
    with pytest.raises(UserError) as caught:
        FedGen(**settings)
    assert caught.value.field == f"algorithm.{field}"


def test_a_model_without_a_marked_classifier_is_refused():
    blind = dataclasses.replace(personal.deep(), peel_points=())
    with pytest.raises(UserError, match="does not mark it") as caught:
        FedGen().build(oracles.context(blind, 5, 2, 3))
    assert caught.value.field == "model"
