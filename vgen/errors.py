"""What vgen says when it cannot go on: what happened, why, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class VgenError(Exception):
    """A failure that the user can mend. Ends the command with exit code 1.

    `message` says what happened and why; `do` says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, do: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.do = do

    def __str__(self) -> str:
        return f"{self.message}\n  {self.do}" if self.do else self.message


class UsageError(VgenError):
    """The command line or a settings file asks for something that cannot be. Exit code 2."""

    exit_code = 2


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known word nearest to `name`, and then all of them."""
    words = sorted(known)
    near = get_close_matches(name, words, n=1)
    start = f"Did you mean '{near[0]}'? " if near else ""
    return f"{start}Known: {', '.join(words)}." if words else f"{start}None is known."
