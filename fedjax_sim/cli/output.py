"""What the command line says and where: standard output that may be lost, warnings, XLA's noise."""

import contextlib
import os
import subprocess
import sys
import typing
from collections.abc import Iterator


@contextlib.contextmanager
def without_loader_noise() -> Iterator[None]:
    """Keeps XLA's complaint about `prefer-no-gather` off the screen: kilobytes for each cached CPU program.

    That is a hint to the code generator and no property of a processor; XLA compares it as if it were one.
    The messages come from C++, so the whole of stderr goes through a filter process. Real differences between
    machines cannot occur: the cache's folder is named after the processor's features.
    """
    try:
        own = os.dup(2)
    except OSError:
        yield
        return
    # What Python writes needs no filter, and goes to where it went: a progress bar on a terminal stays one.
    ours = open(own, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    source = (
        "import sys\nfor line in sys.stdin.buffer:\n"
        "    if not (b'cpu_aot_loader' in line and b'feature +prefer-no-' in line):\n"
        "        sys.stderr.buffer.write(line); sys.stderr.flush()"
    )
    # In a session of its own, or Ctrl-C would end it before us.
    command = [sys.executable, "-S", "-c", source]
    filtering = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=own, start_new_session=True)
    assert filtering.stdin is not None
    os.dup2(filtering.stdin.fileno(), 2)
    filtering.stdin.close()
    before = sys.stderr
    if before is sys.__stderr__:
        sys.stderr = ours
    try:
        yield
    finally:
        sys.stderr = before
        ours.close()
        sys.stderr.flush()
        os.dup2(own, 2)
        os.close(own)
        filtering.wait(timeout=10)


def told(run: typing.Any) -> None:
    """Prints what came of a run, and where it is; the first of several processes alone does."""
    from fedjax_sim.engine import hosts, programs

    if not hosts.first():
        return
    print(run)
    if (made := programs.count()).seconds:
        print(made)
    if run.folder is not None:
        print(f"written to {run.folder}")


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """See `warnings.showwarning`: a warning as a user reads it, one line without the place in the source.

    Args:
      message: of the warning.
      category: is not shown.
      filename: is not shown.
      lineno: is not shown.
      file: where it is written; None: standard error.
      line: is not shown.
    """
    del category, filename, lineno, line
    complain(f"warning: {message}", file)


def complain(line: str, file: typing.TextIO | None = None) -> None:
    """A line on standard error, if that can be written: where it cannot, there is nobody to tell."""
    bars = sys.modules.get("tqdm")  # one that is being drawn makes room for the line
    with contextlib.suppress(OSError, ValueError):
        if bars is not None:
            bars.tqdm.write(line, file=file or sys.stderr)
        else:
            print(line, file=file or sys.stderr)
        (file or sys.stderr).flush()


class Output:
    """Standard output whose loss does not end the work: of a full disk, or a pipe that nobody reads.

    Attributes:
      lost: what went wrong; from then on nothing is written.
    """

    def __init__(self, stream: typing.TextIO):
        self._stream = stream
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        """See TextIO."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """See TextIO."""
        self._try(self._stream.flush)

    def _try(self, action: typing.Callable[[], object]) -> None:
        if self.lost is not None:
            return
        try:
            action()
        except UnicodeError:
            raise
        except (OSError, ValueError) as error:  # the second: it is closed
            self.lost = error
            # What its buffer holds would fail again when Python ends.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self._stream, name)


def open_closed() -> None:
    """Opens what a shell has closed (`>&-`): the next file would get its number, and others' messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
