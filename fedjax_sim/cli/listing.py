"""`fedjax-sim list`."""

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class List:
    """Prints the names of all algorithms, models, data and partitions, and the settings of each algorithm."""

    examples: ClassVar = (
        ("fedjax-sim list", "everything"),
        ("fedjax-sim list | grep -A1 fedprox", "one method"),
    )

    def __call__(self) -> int:
        """See `Command`."""
        from fedjax_sim import algorithms, data, models
        from fedjax_sim.reports import algorithm_docs

        print("algorithms (--algorithm NAME)")
        for name, cls in algorithms.CONFIGS.items():
            print(f"  {name:18} {algorithm_docs.summary(cls)}.")
            fields = ", ".join(
                f"{f.replace('_', '-')} {value}" for f, value in algorithm_docs.defaults(cls).items()
            )
            if fields:
                print(f"  {'':18}   {fields}")
        print("\nmodels (--model.name NAME)")
        for name, about in models.names().items():
            print(f"  {name:18} {about}")
        print("\ndata (--data.source NAME)")
        for name in data.names():
            about = data.PRESETS[name].origin if name in data.PRESETS else SOURCES.get(name, "")
            print(f"  {name:18} {about}")
        for scheme, about in data.SCHEMES.items():
            print(f"  {scheme + ':PATH' if scheme != 'tfds' else 'tfds:NAME':18} {about}")
        print("\npartitions (--partition.kind NAME)")
        for name in data.KINDS:
            print(f"  {name:18} {PARTITIONS.get(name, '')}")
        return 0


SOURCES = {
    "digits": "8x8 handwritten digits, part of this package",
    "digits-domains": "the same in several renderings, one domain each",
}
PARTITIONS = {
    "iid": "random and even",
    "dirichlet": "each class spread over clients by Dirichlet(alpha); sizes differ (FedMR)",
    "dirichlet-classes": "each client's class mix from Dirichlet(alpha); clients may share samples (LIPS)",
    "pathological": "exactly classes_per_client classes each",
    "shards": "McMahan's sorted shards, classes_per_client of them each",
    "domain": "one or more clients for each domain",
    "natural": "one client for each writer",
    "quantity": "even classes, log-normal sizes (sigma)",
    "identical": "the same samples in the same order for all: a control",
    "file": "as a JSON file says (path)",
}
