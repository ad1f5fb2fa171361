"""The package's own diagnostics, as a configuration asks for them by its sections."""

from fedjax_sim.config import RunConfig
from fedjax_sim.engine.setup import MeterConfig, ObserverConfig
from fedjax_sim.probes.inertia.effectiveness import AggregationEffectiveness
from fedjax_sim.probes.inertia.movement import LayerMovement
from fedjax_sim.probes.peel.instrument import LayerPeeled


def observers(config: RunConfig) -> list[ObserverConfig]:
    """Those of measured rounds. Where several measure a round, the first chooses the clients."""
    wanted: list[tuple[int, ObserverConfig]] = [
        (config.peel.every, LayerPeeled(config.peel)),
        (config.inertia.every, AggregationEffectiveness(config.inertia)),
    ]
    return [observer for every, observer in wanted if every]


def meters(config: RunConfig) -> dict[str, MeterConfig]:
    """Those of every round. Their names are keys of checkpoints."""
    return {"movement": LayerMovement(config.inertia)} if config.inertia.measure else {}
