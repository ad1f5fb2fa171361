"""`fedjax-sim new`: files to edit, which work as they are, with their test."""

import dataclasses
import importlib.util
import keyword
import os
import re
import sys
from importlib import resources
from pathlib import Path
from typing import ClassVar

from fedjax_sim.cli.options import value, words
from fedjax_sim.core import fields, paths
from fedjax_sim.core.errors import NotWritten, UserError

NEXT: dict[str, tuple[str, ...]] = {
    "method": (
        "python -m pytest test_{name}.py",
        "fedjax-sim run --algorithm {name}:{Name} --algorithm.beta 0.2 --rounds 20",
    ),
    "task": (
        "python -m pytest test_{name}.py",
        "fedjax-sim run --data.source {name}:{name} --partition.kind iid --partition.clients 10 --rounds 20",
    ),
    "diagnostic": (
        "python -m pytest test_{name}.py",
        "fedjax-sim run --observers '[{{name: \"{name}:{Name}\", every: 5}}]' --rounds 20",
    ),
    "study": ("python -m pytest test_{name}.py", "./run.sh"),
}
"""Kind -> what works at once."""


@dataclasses.dataclass(frozen=True)
class New:
    """Writes a skeleton that works as it is, to edit: its files, its test, and what to run next.

    - method: NAME.py with a frozen dataclass and its record of pure functions, and a test against NumPy
    - task: NAME.py with a task and a data set that has it, and a test against NumPy
    - diagnostic: NAME.py with an observer of measured rounds, and a test against NumPy
    - study: a folder NAME with a sweep's file, a README, run.sh and a test

    NAME is a Python name in lower case, such as my_method. Nothing that is there is overwritten.

    Attributes:
      given: what to write, and its name
      dir: the folder it is written to, which is made if need be
    """

    examples: ClassVar = (
        ("fedjax-sim new method my_method", "my_method.py and its test"),
        ("fedjax-sim new study rates --dir studies", "a folder studies/rates"),
    )

    given: tuple[str, ...] = words("KIND NAME", least=2, most=2, kind="kind")
    dir: str = value("DIR", ".", kind="folder")

    def __call__(self) -> int:
        """See `Command`."""
        kind, name = self.given
        if kind not in NEXT:
            raise UserError("new", kind, "there is no such kind", fields.nearest(kind, NEXT))
        folder = paths.local(self.dir, "--dir") / (name if kind == "study" else "")
        check_name(name, folder)
        check_taken(kind, name)
        texts = rendered(kind, name)
        for file in texts:
            if os.path.lexists(folder / file):
                fix = "Choose another name, or another --dir."
                raise UserError("new", str(folder / file), "this file is there already", fix)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in texts.items():
                (folder / file).write_text(text, encoding="utf-8")
                if file.endswith(".sh"):
                    (folder / file).chmod(0o755)
                print(f"wrote {folder / file}")
        except OSError as error:
            raise NotWritten.of("--dir", self.dir, error, "start it again") from None
        print("\nIt works as it is:")
        if folder != Path():
            print(f"  cd {folder}")
        if importlib.util.find_spec("pytest") is None:
            print("  pip install pytest")
        for line in NEXT[kind]:
            print(f"  {line.format(name=name, Name=class_name(name))}")
        print(f"Then edit {name}.{'yaml' if kind == 'study' else 'py'}: its comments say what goes where.")
        return 0


def rendered(kind: str, name: str) -> dict[str, str]:
    """File -> text, of a skeleton.

    Args:
      kind: of it.
      name: that the user chose.
    """
    import jinja2

    made = {}
    engine = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    for template in (resources.files("fedjax_sim.cli") / "templates" / kind).iterdir():
        file = template.name.removesuffix(".jinja").replace("NAME", name)
        text = template.read_text(encoding="utf-8")
        made[file] = engine.from_string(text).render(name=name, Name=class_name(name))
    return dict(sorted(made.items()))


def class_name(name: str) -> str:
    """`MyMethod` of `my_method`."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def check_name(name: str, folder: Path) -> None:
    """Raises UserError for a name that no module of the user's can have.

    Args:
      name: that the user chose.
      folder: where the module would be.
    """
    if (
        not re.fullmatch(r"[a-z][a-z0-9_]*", name)
        or keyword.iskeyword(name)
        or not class_name(name).isidentifier()
    ):
        plain = re.sub(r"\W+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).strip("_").lower()
        good = re.fullmatch(r"[a-z][a-z0-9_]*", plain) and not keyword.iskeyword(plain)
        why = "it is no Python name in lower case"
        raise UserError("new", name, why, f"Write {plain if good else 'my_' + (plain or 'method')}.")
    spec = None if name in sys.builtin_module_names else importlib.util.find_spec(name)
    origin = (spec.origin or "a package") if spec else "part of Python"
    own = spec is None or Path(origin).parent.resolve() == folder.resolve()
    if name in sys.builtin_module_names or not own:
        why = f"a module of that name is installed ({origin}), and would be found in its place"
        raise UserError("new", name, why, f"Choose another, such as my_{name}.")


def check_taken(kind: str, name: str) -> None:
    """Raises UserError for a name that is built in.

    Args:
      kind: of the skeleton.
      name: that the user chose.
    """
    from fedjax_sim import algorithms, data  # JAX loads when something is asked of them

    taken = {
        "method": ("an algorithm", algorithms.CONFIGS),
        "task": ("a data set", data.names()),
        "diagnostic": ("a diagnostic", ("peel", "inertia")),
    }
    what, known = taken.get(kind, ("", ()))
    if name in {one.replace("-", "_") for one in known}:
        raise UserError(
            "new", name, f"{what} of that name is built in", f"Choose another, such as my_{name}."
        )
