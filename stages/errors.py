"""What can go wrong, and with which exit code the command line says so.

    TriviumError              1   unexpected
    ├── InvalidInput          2   a spec, a model or data that cannot be used; nothing was trained
    ├── GateRefused           3   a gate did not pass, and the spec says stop
    ├── StageFailed           4   a stage broke; what was finished before is kept
    │   └── StageSilent            its process hung, and was ended
    └── TryAgain              75  another run holds the lock, or the process was told to stop
        └── AwaitingApproval       gates refuse, and the spec says that a person decides

`specs.load.SpecError`, raised by the grammar, which imports nothing of ours, ends with 2 as well.
"""

from specs.printable import printable


class TriviumError(Exception):
    """Anything that ends a command. The message is for people: what was found, where, what to do."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message; what it quotes of others cannot move the cursor of who reads it."""
        return printable(super().__str__())


class InvalidInput(TriviumError):
    """A spec, a model or data that cannot be used."""

    exit_code = 2


class GateRefused(TriviumError):
    """A gate did not pass and the spec says to stop."""

    exit_code = 3


class StageFailed(TriviumError):
    """A stage broke. What was published before it is kept, and a rerun goes on from there."""

    exit_code = 4


class StageSilent(StageFailed):
    """A stage's process hung. It was ended; a rerun resumes at its last checkpoint."""


class TryAgain(TriviumError):
    """The work can go on later: another process holds the lock, or this one was told to stop."""

    exit_code = 75


class AwaitingApproval(TryAgain):
    """Gates refuse a stage and a person has to decide; nothing is held meanwhile."""

    def __init__(self, message: str, question: str) -> None:
        """Keep what is asked: the fingerprint of the artifact and of what its gates came to."""
        super().__init__(message)
        self.question = question


BY_EXIT_CODE: dict[int, type[TriviumError]] = {
    error.exit_code: error for error in (TriviumError, InvalidInput, GateRefused, StageFailed, TryAgain)
}
"""How a parent process turns a stage's exit code back into its error."""
