"""The rate experiment: its float64 optimum, and that the engine runs exactly the problem that it states."""

import jax
import numpy as np
import pytest

from experiments.theory import rates
from experiments.theory.rates import Case
from fedjax_sim.config import LocalConfig
from fedjax_sim.data import normalise
from fedjax_sim.runs.federation import Simulation
from tests import oracles

NAMES = tuple(rates.PROBLEMS)


@pytest.fixture(params=NAMES)
def problem(request) -> rates.Problem:
    return rates.PROBLEMS[request.param]()


# --- the float64 side -----------------------------------------------------------------------------------


def test_values_gradients_and_hessians_agree(problem, rng):
    w, direction = rng.standard_normal((2, rates.FEATURES, rates.OUTPUTS))
    step = 1e-5 * direction
    slope = (problem.values(w + step) - problem.values(w - step)) / 2e-5
    np.testing.assert_allclose(slope, (problem.gradients(w) * direction).sum((1, 2)), rtol=1e-7)
    bend = (problem.gradients(w + step) - problem.gradients(w - step)) / 2e-5
    along = problem.hessians(w) @ direction.ravel()
    np.testing.assert_allclose(bend.reshape(along.shape), along, rtol=1e-6, atol=1e-8)


def test_gradient_vanishes_at_the_optimum_and_clients_disagree(problem):
    best = problem.minimum()
    assert np.abs(problem.gradients(best).mean(0)).max() < 1e-13
    assert np.linalg.eigvalsh(problem.hessians(best).mean(0)).min() > 0.05
    own = problem.minimum([3])
    assert np.abs(problem.gradients(own)[3]).max() < 1e-13
    constants = problem.constants()
    assert constants["Gamma"] > 0.1
    assert constants["batch_gradient_variance"] > 0.1


def test_constants_bound_every_hessian(problem, rng):
    constants = problem.constants()
    for w in (problem.minimum(), rng.standard_normal((rates.FEATURES, rates.OUTPUTS))):
        eigenvalues = np.linalg.eigvalsh(problem.hessians(w))
        assert eigenvalues.min() >= constants["mu"] * (1 - 1e-9)
        assert eigenvalues.max() <= constants["L"] * (1 + 1e-9)


def test_excess_is_the_difference_of_values(problem, rng):
    w = problem.minimum() + rng.standard_normal((4, rates.FEATURES, rates.OUTPUTS))
    wanted = [problem.values(one).mean() - problem.values(problem.minimum()).mean() for one in w]
    np.testing.assert_allclose(problem.excess(w), wanted, rtol=1e-10)
    assert abs(problem.excess(problem.minimum()[None])[0]) < 1e-15


def test_step_size_is_that_of_the_theory():
    lr, decay = rates.step_size({"mu": 0.1, "kappa": 12.0}, 40)
    local = LocalConfig(lr=lr, schedule="inverse", decay=decay)
    for r in (0, 1, 70, 3000):
        assert local.lr_at(r, 3001) == pytest.approx(2 / (0.1 * (96 + 40 * r)))


def test_slopes_of_power_laws():
    edges = rates.bin_edges(2000)
    assert edges[0] == 0 and edges[-1] == 2000 and (np.diff(edges) > 0).all()
    rounds = np.sqrt((edges[:-1] + 1) * edges[1:])
    values = np.stack([rounds**-1.5, 7 * rounds**-0.5])
    values[:, rounds < 200] = 1  # the early rounds do not count
    found = rates.slopes({"rounds": rounds, "excess": values}, "excess")
    np.testing.assert_allclose(found, [-1.5, -0.5], rtol=1e-10)
    mean, half = rates.interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2 and half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)


# --- the engine's side ----------------------------------------------------------------------------------


def test_the_compiled_step_sees_exactly_the_stated_numbers(problem):
    dataset = rates.world(problem)["dataset"]
    seen = np.asarray(normalise(dataset.train_images, dataset.preprocessing)).reshape(
        *problem.x.shape[:2], -1
    )
    np.testing.assert_array_equal(seen[..., : rates.FEATURES], problem.x)
    if problem.name == "quadratic":
        np.testing.assert_array_equal(seen[..., rates.FEATURES :], problem.y)
    else:
        np.testing.assert_array_equal(dataset.train_labels.reshape(problem.y.shape[:2]), problem.y.argmax(2))


def by_hand(problem: rates.Problem, starts: np.ndarray, run: Simulation, number: int) -> np.ndarray:
    """Local training of round `number` (from 0) in float64. f64[K, d, C] -> f64[K, d, C]."""
    config = run.setup.config
    lr, trained = config.local.lr_at(number, config.rounds), []
    for client, w in zip(run.inputs(number)[0].cohort.ids.tolist(), starts, strict=True):
        for chosen in oracles.client_batches(config.seed, number, client, rates.SAMPLES, config.local):
            batch = rates.Problem(
                problem.name, problem.x[client, chosen][None], problem.y[client, chosen][None], problem.l2
            )
            w = w - lr * batch.gradients(w)[0]
        trained.append(w)
    return np.stack(trained)


@pytest.mark.parametrize(
    ("name", "work", "method"),
    [("quadratic", "1 epoch", "FedAvg"), ("quadratic", "1 epoch", "FedMR"), ("logistic", "5 steps", "FedMR")],
)
def test_rounds_agree_with_a_float64_simulation_by_hand(name, work, method):
    problem = rates.PROBLEMS[name]()
    run = Simulation(rates.set_up(problem, Case(name, work, 5, method), 10, seed=3))
    starts = np.zeros((5, rates.FEATURES, rates.OUTPUTS))
    for number in range(2):
        rows = run.step()()
        trained = by_hand(problem, starts, run, number)
        mean, spread = trained.mean(0), ((trained - trained.mean(0)) ** 2).sum()
        np.testing.assert_allclose(rates.whole(run.variables), mean, rtol=1e-5, atol=1e-6)
        assert oracles.value_of(rows, "dispersion", number + 1) == pytest.approx(spread, rel=1e-5)
        if method == "FedAvg":
            # Nothing but what the mean of equal slots rounds off: an ulp of each number, squared.
            ulps = 5 * np.square(np.finfo(np.float32).eps * mean).sum()
            assert oracles.value_of(rows, "dispersion_after", number + 1) <= ulps
            starts = np.broadcast_to(mean, starts.shape)
            continue
        # What the slots hold next has the same mean and the same D, and is no longer any client's own model.
        starts = rates.whole(run.state.algorithm.slots)
        np.testing.assert_allclose(starts.mean(0), mean, rtol=1e-5, atol=1e-6)
        assert ((starts - starts.mean(0)) ** 2).sum() == pytest.approx(spread, rel=1e-5)
        apart = np.abs(starts[:, None] - trained[None]).max((2, 3)).min(1)
        assert apart.max() > 0.01


def test_fedmr_expects_the_mean_that_gradient_descent_would_take():
    """On a quadratic, over who gets which slot: E mean' = mean − lr ∇F(mean), however far slots spread."""
    problem = rates.quadratic()
    case, rounds = Case("quadratic", "1 epoch", 20, "FedMR"), 204
    setup = rates.set_up(problem, case, rounds, batch_size=rates.SAMPLES, lr=0.3, decay=0.0)
    run = Simulation(setup)
    for _ in range(4):
        run.step()()
    state = jax.tree.map(np.asarray, run.state)
    slots, after = rates.whole(state.algorithm.slots), []
    for number in range(4, rounds):
        run.restore(state, number)
        run.step()()
        after.append(rates.whole(run.variables))
    wanted = slots.mean(0) - 0.3 * problem.gradients(slots.mean(0)).mean(0)
    error = np.std(after, 0, ddof=1) / np.sqrt(len(after))
    assert (np.abs(np.mean(after, 0) - wanted) < 4.5 * error).all()
    assert np.abs(wanted - slots.mean(0)).max() > 20 * error.max()
    assert error.min() > 0  # the slots do differ, so a single round does not tell


def test_a_short_measurement_comes_closer_and_the_merge_keeps_mean_and_spread():
    problem = rates.logistic()
    result = rates.measure(Case("logistic", "1 epoch", 5, "FedMR"), 60, 2)
    first = problem.excess(np.zeros((1, rates.FEATURES, rates.OUTPUTS)))[0]
    assert (result["end_excess"] < 0.05 * first).all()
    assert 0 <= result["dispersion_changed"] < 1e-5
    assert result["mean_moved"] < 1e-5
    assert result["dispersion"].min() > 0.01
    # Every seed draws cohorts of its own; batches and permutations alone would part them by a percent.
    assert abs(np.log(result["end_excess"][0] / result["end_excess"][1])) > 0.1
