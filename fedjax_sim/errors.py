"""The one kind of error that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in what the user gave: says which field, what it held, why not, and the way out.

    The command line prints the message without a traceback and exits with status 2.

    Attributes:
      field: dotted name of the setting or the file, as the user wrote it (`partition.alpha`).
      value: what it held.
    """

    def __init__(self, field: str, value: object, why: str, fix: str):
        self.field = field
        self.value = value
        super().__init__(f"{field} = {value!r}: {why.rstrip('.')}. {fix}")

    def __reduce__(self):
        return _rebuild, (str(self), self.field, self.value)


def _rebuild(message: str, field: str, value: object) -> UserError:
    error = UserError.__new__(UserError)
    ValueError.__init__(error, message)
    error.field, error.value = field, value
    return error
