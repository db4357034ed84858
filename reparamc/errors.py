"""Every exception that reparamc raises on purpose.

Each message is one line that names what is wrong, where, and what to do about it.
"""


def one_line(error: BaseException | None) -> str:
    """The message of ``error`` on one line, the name of its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class ReparamcError(Exception):
    """The family: catch this to catch everything below."""


class InputError(ReparamcError, ValueError):
    """The model, file or option has the right type and an unusable value."""


class InputTypeError(ReparamcError, TypeError):
    """The argument is of a type that reparamc cannot fuse."""


class VerificationError(ReparamcError, RuntimeError):
    """The rewritten graph does not compute what the original computes; nothing was written.

    Attributes:
        where: name of the offending region or output.
        before, after: what the region was and what was made of it, as text; empty where no region is known to be wrong.
    """

    def __init__(self, message: str, *, where: str, before: str = "", after: str = "") -> None:
        super().__init__(message)
        self.where, self.before, self.after = where, before, after

    def __reduce__(self) -> tuple[object, ...]:
        return _verification_error, (str(self), self.where, self.before, self.after)


class RecipeError(ReparamcError, ValueError):
    """Rewrites that were found for one set of parameters do not hold for another."""


class RewriteLimitError(ReparamcError, RuntimeError):
    """A set of rules does not terminate: a fault in a rewrite, not in the model."""


def _verification_error(message: str, where: str, before: str, after: str) -> VerificationError:
    return VerificationError(message, where=where, before=before, after=after)
