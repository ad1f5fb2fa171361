"""`fedjax-sim plan` and `fedjax-sim tune-machine`."""

import dataclasses
import re
from typing import Any, ClassVar

from fedjax_sim.cli import output
from fedjax_sim.cli.options import configuration, switch, value
from fedjax_sim.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Plan:
    """Says what a configuration will need in memory. Of a sweep's file: each of its methods in each setting.

    Attributes:
      config: of the run, or of a sweep.
      exact: compile the round, and add what XLA says of it
      on: compile the programs for a machine that need not be here, and say what they take on a chip and what
        chips exchange. Such as v5e-8, v5p-16, 2xv5e-256, 8xh100 or cpu-8. v5e and v6e are counted
        in chips, v4 and v5p in TensorCores, of which a chip has two. Takes up to ten minutes on two cores
      together: compile the rounds of S such runs side by side (sweep --together) instead; with --on
      json: print one object for programs; with --on
    """

    examples: ClassVar = (
        ("fedjax-sim plan my.yaml", "part by part, in seconds"),
        ("fedjax-sim plan my_study.yaml", "a sweep's methods and settings"),
        ("fedjax-sim plan my.yaml --exact", "what XLA says of it too"),
        ("fedjax-sim plan my.yaml --on v5e-256", "on a pod that is not here"),
    )

    config: Any = configuration(or_sweep=True)  # noqa: RUF009
    exact: bool = switch()
    on: str | None = value("MACHINE", kind="v5e-8 v5e-256 v5p-16 v6e-8 8xh100 cpu-8")
    together: str | None = value("S")
    json: bool = switch()

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim.config.sweep_files import Sweep
        from fedjax_sim.runs.aot import machines
        from fedjax_sim.runs.plan import plan

        if isinstance(self.config, Sweep):
            return self._sweep()
        if self.on is None:
            if self.json:
                why, fix = "it says what --on finds", "Name a machine with --on."
                raise UserError("command line", "--json", why, fix)
            if self.together is not None:
                raise UserError("command line", "--together", "it is of a machine", "Name one with --on.")
            found = plan(self.config, exact=self.exact)
        else:
            if self.together is not None and not self.together.isdecimal():
                fix = "Write how many runs, as in --together 64."
                raise UserError("--together", self.together, "it is no number", fix)
            machines.start_for(self.on)
            runs = None if self.together is None else int(self.together)
            found = plan(self.config, exact=self.exact, on=self.on, together=runs, say=output.complain)
            if self.json:
                print(found.to_json())
                return 1 if found.fits is False else 0
        print(found)
        return 1 if found.fits is False else 0

    def _sweep(self) -> int:
        from fedjax_sim.studies import planning

        for name in ("exact", "on", "together", "json"):
            if getattr(self, name):
                why, fix = "it is of one run, and this is the file of a sweep", "Leave it out."
                raise UserError("command line", f"--{name}", why, fix)
        found = planning.plan(self.config)
        print(found)
        return 1 if found.fits is False else 0


@dataclasses.dataclass(frozen=True)
class TuneMachine:
    """Measures which width of waves and implementation of the convolution is fastest on this machine for runs
    like this one, and keeps it for those that begin later (execution.calibration).

    Attributes:
      config: of such a run.
      seconds: how long comparing layouts takes, roughly
      no_devices: do not try other numbers of CPU devices, which takes about as long again
      json: print one object for programs
      forget: measure nothing, and remove the file of all that was measured on this machine
    """

    examples: ClassVar = (
        ("fedjax-sim tune-machine my.yaml", "about a minute; later runs use it"),
        ("fedjax-sim tune-machine --forget", "drops all that was measured"),
    )

    config: Any = configuration()  # noqa: RUF009
    seconds: str | None = value("S")
    no_devices: bool = switch()
    json: bool = switch()
    forget: bool = switch()

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim.runs import calibration

        if self.forget:
            gone = calibration.forget()
            print(f"removed {gone}" if gone else "nothing is kept")
            return 0
        given = f"{calibration.SECONDS}" if self.seconds is None else self.seconds
        seconds = float(given) if re.fullmatch(r"\d+(\.\d*)?", given) else 0.0
        if not seconds:
            raise UserError("--seconds", given, "it must be a number above 0", "Give one, such as 30.")
        from fedjax_sim.runs import tuning

        found = tuning.tune(self.config, seconds=seconds, devices=not self.no_devices)
        print(found.to_json() if self.json else found)
        return 0
