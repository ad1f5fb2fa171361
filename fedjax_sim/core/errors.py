"""The one kind of error that a user's mistake raises."""

import errno

_MOST = 120
"""Letters of a mapping or a list that a message shows."""


class UserError(ValueError):
    """A mistake in what the user gave: says which field, what it held, why not, and the way out.

    The command line prints the message without a traceback and exits with status 2.

    Attributes:
      field: dotted name of the setting or the file, as the user wrote it (`partition.alpha`).
      value: what it held.
      why: what is wrong with it.
      fix: the way out.
      detail: what the command line prints above the message, such as a traceback; mostly "".
    """

    detail = ""

    def __init__(self, field: str, value: object, why: str, fix: str):
        self.field = field
        self.value = value
        self.why, self.fix = why.rstrip("."), fix
        shown = repr(value)
        if not isinstance(value, str) and len(shown) > _MOST:  # of a path or a command every letter counts
            shown = shown[: _MOST - 1] + "…"
        super().__init__(f"{field} = {shown}: {self.why}. {fix}")

    def moved(self, old: str, new: str) -> "UserError":
        """The same of a field below `new`, if it was below `old`, as both end in a dot."""
        if not self.field.startswith(old) or self.field.startswith(new):
            return self
        return type(self)(new + self.field.removeprefix(old), self.value, self.why, self.fix)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.field, self.value, self.why, self.fix)


class NotWritten(UserError):
    """A file cannot be written: the disk or a quota is full, or the disk fails. What is there stays sound."""

    @classmethod
    def of(cls, field: str, value: object, error: OSError, then: str) -> "NotWritten":
        """The error for one of the operating system.

        Args:
          field: dotted name of the setting that says where.
          value: what it is.
          error: of the system; a full disk has a fix of its own.
          then: what to do once the file can be written again, as the end of a sentence without its full stop.
        """
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why = f"it cannot be written: {error.strerror or ' '.join(str(error).split())}"
        return cls(field, value, why, f"{'Make room' if full else 'Fix that'}, then {then}.")
