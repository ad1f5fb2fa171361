"""What a configuration will need, before it is run: of memory here, or of a machine that is not here."""

import dataclasses
from typing import Any, overload

import jax

from fedjax_sim.config import RunConfig, as_config
from fedjax_sim.core.errors import UserError
from fedjax_sim.engine import placement
from fedjax_sim.engine.setup import Setup
from fedjax_sim.engine.simulation import Simulation
from fedjax_sim.runs.aot.plan import MachinePlan, plan_on
from fedjax_sim.runs.assemble import prepare
from fedjax_sim.runs.parts import (
    ON_HOST,
    Part,
    advised,
    available,
    data_parts,
    human,
    on_paper,
    parts_of,
    shown,
    state_parts,
    total,
)
from fedjax_sim.runs.start import with_start


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """All parts, and what there is to hold them. `print` it.

    Attributes:
      parts: largest first within their kind.
      devices: how many.
      platform: cpu, gpu or tpu. CPU devices share one memory, and only totals count.
      available: bytes for one device, or for all of them on a CPU; None where it cannot be told.
      compiled: XLA's own figures for the round in bytes a device, if asked for. The verdict heeds them.
    """

    parts: tuple[Part, ...]
    devices: int
    platform: str
    available: int | None
    compiled: dict[str, int] | None = None

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: on one device, or in all of the CPU's memory.

        By the parts, or as the round was compiled, whichever is more.
        """
        return max(self.by_parts, self.as_compiled or 0)

    @property
    def by_parts(self) -> int:
        """As `peak`, by the parts alone."""
        return self._size("always") + max(map(self._size, ("round", "probe", "evaluation")))

    @property
    def as_compiled(self) -> int | None:
        """As `peak`, of the round by XLA's figures, with what is held beside it; None if not asked for."""
        if self.compiled is None:
            return None
        made = self.compiled["temporaries"] + self.compiled["output"] - self.compiled["of which in place"]
        # What is always there has the round's arguments in it, but for the padding of an accelerator's tiles.
        held = max(self._size("always"), self.compiled["arguments"])
        return held + made * (self.devices if self.platform == "cpu" else 1)

    def _size(self, when: str) -> int:
        whole = self.platform == "cpu"
        return sum(part.total if whole else part.device for part in self.parts if part.when == when)

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the memory is not known."""
        return None if self.available is None else self.peak <= self.available

    def advice(self) -> list[str]:
        """What to change, the most effective first; empty if it fits."""
        if self.fits is not False:
            return []
        whole = self.platform == "cpu"
        ranked = sorted(self.parts, key=lambda part: -(part.total if whole else part.device))
        lines = [f"{part.name}: {part.remedy}" for part in ranked if part.remedy]
        return list(dict.fromkeys(lines))[:4]

    def __str__(self):
        rows = shown(self.parts, lambda part: part.total)
        width = max(len(part.name) for part in rows)
        lines = [f"{'part':{width}}  {'one device':>11}  {'all ' + str(self.devices):>11}  when"]
        lines += [
            f"{part.name:{width}}  {human(part.device):>11}  {human(part.total):>11}  {part.when}"
            for part in rows
        ]
        where = "all of the machine" if self.platform == "cpu" else "one device"
        lines.append(f"\npeak, {where}: {human(self.peak)}")
        if self.as_compiled is not None:
            lines[-1] += f" (the larger of {human(self.by_parts)} by the parts"
            lines[-1] += f" and {human(self.as_compiled)} as compiled)"
        if self.compiled:
            figures = ", ".join(f"{name} {human(size)}" for name, size in self.compiled.items())
            lines.append(f"the compiled round, one device: {figures}")
        if self.available is None:
            lines.append("available: not known on this platform")
        else:
            lines.append(f"available: {human(self.available)}: it {'fits' if self.fits else 'does NOT fit'}")
        if self.advice():
            lines += ["what to change, the most effective first:", *(f"  - {line}" for line in self.advice())]
        return "\n".join(lines)


@overload
def plan(
    config: RunConfig | Setup, *, exact: bool = ..., on: None = ..., **replacements: Any
) -> MemoryPlan: ...
@overload
def plan(
    config: RunConfig, *, exact: bool = ..., on: str, together: int | None = ..., **replacements: Any
) -> MachinePlan: ...
def plan(
    config: RunConfig | Setup,
    *,
    exact: bool = False,
    on: str | None = None,
    together: int | None = None,
    **replacements: Any,
) -> MemoryPlan | MachinePlan:
    """What a run will take. Loads the data, allocates nothing on a device unless `exact`.

    Args:
      config: what is to be run, or what `prepare` made of it.
      exact: compile the round too, and add XLA's own figures.
      on: a machine that need not be here, such as v5e-256, 8xh100 or cpu-8: compiles the programs for it
        (`fedjax_sim.runs.aot`), and says what they take of it and what its devices exchange.
      together: with `on`: compiles the rounds of so many such runs side by side, and nothing else.
      **replacements: as for `prepare`.

    Raises:
      UserError: a configuration that cannot work, no such machine, its compiler is not installed, `exact` of
        a machine, or `together` without one.
    """
    if together is not None and on is None:
        fix = "Name a machine, such as cpu-2: run_many itself looks at the memory that is here."
        raise UserError("together", together, "runs side by side are planned for a machine", fix)
    if on is not None and exact:
        raise UserError(
            "plan",
            "exact",
            f"{on} compiles its programs anyway, and all figures are XLA's",
            "Leave exact out, or plan for the devices that are here, without a machine.",
        )
    if on is not None:
        return plan_on(as_config(config), on, together=together, **replacements)
    if not isinstance(config, Setup):  # of a run that is debugged, what it takes otherwise
        config = as_config(config)
        execution = dataclasses.replace(config.execution, debug=False)
        config = dataclasses.replace(config, execution=execution)
        config = with_start(prepare(config, calibrated=True, **replacements))
    setup = config
    platform, simulation = placement.platform_of(setup.mesh), on_paper(setup)
    parts = parts_of(simulation)
    compiled = compiled_round(simulation) if exact else None
    return MemoryPlan(tuple(parts), setup.devices, platform, available(platform), compiled)


def compiled_round(simulation: Simulation) -> dict[str, int]:
    """XLA's own account of the compiled round: bytes on one device."""
    inputs, _ = simulation.inputs_of(0, simulation.setup.draw(0))
    with jax.set_mesh(simulation.mesh):
        data = simulation.data_of(0, inputs)
        made = simulation.program.lower(simulation.abstract_state(), inputs, data).compile()
    found: Any = made.memory_analysis()
    return {
        "arguments": int(found.argument_size_in_bytes),
        "output": int(found.output_size_in_bytes),
        "of which in place": int(found.alias_size_in_bytes),
        "temporaries": int(found.temp_size_in_bytes),
    }


def check_memory(setup: Setup) -> None:
    """Refuses a run whose data and states alone are more than the memory that there is; quick.

    Counts only what is exact and held all the time, and all of the machine's memory, so that nothing is
    refused that could work. `plan` also estimates what a round takes in between.

    Raises:
      UserError: names the largest part, and what makes it smaller.
    """
    platform = placement.platform_of(setup.mesh)
    there = total(platform)
    if not there:
        return
    # A data set in host memory may be the very buffer that the devices read.
    simulation = on_paper(setup)
    held = (part for part in data_parts(simulation, platform) if part.name != ON_HOST)
    parts = [*held, *state_parts(simulation)]
    size = lambda part: part.total if platform == "cpu" else part.device  # noqa: E731
    needed = sum(map(size, parts))
    if needed > there:
        worst = advised(setup, platform, max(parts, key=size))
        raise UserError(
            "memory",
            human(needed),
            f"so much is held all the time ({worst.name}: {human(size(worst))}), and "
            f"{'this machine' if platform == 'cpu' else 'a device'} has {human(there)}",
            f"What helps: {worst.remedy or 'a smaller model'}. `fedjax-sim plan` shows every part.",
        )
