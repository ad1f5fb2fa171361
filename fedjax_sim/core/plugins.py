"""What plugs in from outside by name: dataclasses of settings with one method that the package calls."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from fedjax_sim.core import imports
from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import nearest


class Names:
    """The names of one kind of plug-in: the package's own, and `module:Class` for anybody else's.

    Attributes:
      kind: one of them in a word, for messages.
      method: what each of them has to have.
      builtin: name -> class.
    """

    def __init__(self, kind: str, method: str, builtin: Mapping[str, type]):
        self.kind, self.method, self.builtin = kind, method, builtin
        self._others: dict[str, type] = {}  # those that were asked for by name

    def named(self, name: Any, field: str) -> type:
        """The class called `name`; `field`: where the name stands, for messages.

        Raises:
          UserError: there is none.
        """
        if isinstance(name, str) and name in self.builtin:
            return self.builtin[name]
        wanted = f"a frozen dataclass with a method {self.method}"
        if not imports.is_own(name):
            fix = nearest(str(name), self.builtin) if self.builtin else f"Give module:Class of {wanted}."
            raise UserError(field, name, f"no such {self.kind}", fix)
        found = imports.imported(name, field)
        method = self.method.partition("(")[0]
        if not (isinstance(found, type) and dataclasses.is_dataclass(found) and hasattr(found, method)):
            raise UserError(
                field, name, f"it cannot be used as {_with_article(self.kind)}", f"Give {wanted}."
            )
        return self._others.setdefault(name, found)

    def name_of(self, config: Any) -> str | None:
        """The name by which `named` finds an object's class; None if it has none."""
        known = {**self.builtin, **self._others}
        return next((name for name, cls in known.items() if type(config) is cls), None)

    def check(self, config: Any, field: str) -> None:
        """Raises UserError unless `config` is an object, not a class, that has the method."""
        if isinstance(config, type):
            raise UserError(
                field, config.__name__, "this is a class, not one of it", f"Write {config.__name__}()."
            )
        if not hasattr(config, self.method.partition("(")[0]):
            known = self.builtin.get(config) if isinstance(config, str) else None
            fix = f"Give an object with a method {self.method}"
            fix += f", such as {known.__name__}(); names are for YAML." if known else "."
            raise UserError(field, config, f"this cannot be used as {_with_article(self.kind)}", fix)


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def written(config: Any) -> str:
    """An object as Python writes it, with its settings and without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(config))
