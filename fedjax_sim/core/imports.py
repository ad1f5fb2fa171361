"""What a user wrote, called by a name that a file can hold: `module:Attribute`.

An algorithm, a model and a data set of one's own all have such names. The module lies in the working
directory or is installed.
"""

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import nearest


def is_own(name: Any) -> bool:
    """Whether a name says module and attribute."""
    return isinstance(name, str) and ":" in name


def imported(name: str, field: str) -> Any:
    """What `module:Attribute` names.

    Args:
      name: both, with the module as `import` wants it; it is looked for in the working directory too.
      field: where the name stands, for messages.

    Raises:
      UserError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    fix = f"Give `module:Name`, with the module in {here} or installed."
    if module.endswith(".py") or "/" in module:
        meant = f"{Path(module).stem}:{attribute}"
        fix = f"A module is named without folder and without .py: `{meant}`, started in its folder."
    sys.path.append(here)  # as for a script; the command's own folder stands there instead
    try:
        found = importlib.import_module(module)
        if not hasattr(found, attribute):
            known = [
                own for own, value in vars(found).items() if getattr(value, "__module__", None) == module
            ]
            fix = nearest(attribute, known) if known else fix
        return getattr(found, attribute)
    except Exception as error:
        why = f"it cannot be imported: {type(error).__name__}: {error}{place_of(error)}"
        raise UserError(field, name, why, fix) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def called(
    function: Callable[..., Any], name: str, field: str, options: str, *args: Any, **given: Any
) -> Any:
    """The value of a user's own function, or of a class; its mistakes are told as the user's.

    Args:
      function: what to call.
      name: of it, for messages.
      field: the setting that names it, likewise.
      options: the setting that holds what is `given`, likewise.
      *args: what it gets before its options.
      **given: its options.

    Raises:
      UserError: it takes no such arguments, or it fails; the latter with the line of the user's own code.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, of which Python cannot tell
        signature = None
    if signature is not None:
        try:
            signature.bind(*args, **given)
        except TypeError as error:
            unknown = [one for one in given if not takes(signature, one)]
            if unknown:
                known = [one for one in list(signature.parameters)[len(args) :] if takes(signature, one)]
                fix = nearest(unknown[0], known) if known else "Leave it out: it takes none."
                why = f"{name} has no such option"
                raise UserError(f"{options}.{unknown[0]}", given[unknown[0]], why, fix) from None
            told = ", ".join([f"{len(args)} arguments"] * bool(args) + [f"`{one}`" for one in given])
            why = f"it cannot be called with {told or 'nothing'}: {error}"
            raise UserError(field, name, why, f"Its signature is {name}{signature}.") from None
    try:
        return function(*args, **given)
    except UserError:
        raise
    except Exception as error:
        why = f"it fails: {type(error).__name__}: {error}{place_of(error)}"
        raise UserError(field, name, why, "Correct that line.") from error


def takes(signature: inspect.Signature, keyword: str) -> bool:
    """Whether a function of this signature may be given a keyword of that name."""
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    named = kinds.get(keyword) in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return named or inspect.Parameter.VAR_KEYWORD in kinds.values()


def place_of(error: BaseException) -> str:
    """` (FILE, line N)` of the last of `own_lines`, or ""."""
    lines = own_lines(error)
    return f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""


def told_of(error: BaseException) -> str:
    """`ValueError: its first line (FILE, line N)`, the line being the user's own."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}{place_of(error)}"


def own_lines(error: BaseException) -> list[traceback.FrameSummary]:
    """The lines of the user's own code that an exception went through, outermost first.

    That is code which is neither this package's nor installed nor Python's.
    """
    library = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    theirs = (str(Path(__file__).parents[1]), *library)
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        typed = frame.filename.startswith(("<stdin", "<ipython")) or os.path.isabs(frame.filename)
        if typed and not frame.filename.startswith(theirs) and "site-packages" not in frame.filename:
            lines.append(frame)
    return lines


def checksums(names: Iterable[Any], *, find: bool = False) -> dict[str, int | None]:
    """CRC-32 of the source file of each own module among `names`; None for one that has no file.

    What the module imports in its turn is not looked at.

    Args:
      names: `module:Attribute`, and others, which are left out.
      find: look for the file of a module that is not imported, without importing it; it is left out where
        none is found. Otherwise all that are not imported are.
    """
    out: dict[str, int | None] = {}
    for name in names:
        if not is_own(name):
            continue
        wanted = name.partition(":")[0]
        module = sys.modules.get(wanted)
        if module is not None:
            file = getattr(module, "__file__", None)
        elif find and (file := _file_of(wanted)):
            pass
        else:
            continue
        out[name] = zlib.crc32(Path(file).read_bytes()) if file and Path(file).is_file() else None
    return out


def _file_of(module: str) -> str | None:
    """Where a module that is not imported would be read from; None: it is not found."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        found = importlib.util.find_spec(module)
        return None if found is None or not found.has_location else found.origin
    except (ImportError, ValueError, AttributeError):
        return None
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def frozen(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a module's fields hold them: YAML's lists as tuples, which have a hash."""

    def one(value: Any) -> Any:
        return tuple(map(one, value)) if isinstance(value, list) else value

    return {name: one(value) for name, value in options.items()}
