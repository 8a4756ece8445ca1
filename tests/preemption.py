"""A preemption that needs no signal."""


class AskedAt:
    """A preemption that asks at one step."""

    def __init__(self, step: int) -> None:
        self.training = False
        self._left = step

    @property
    def asked(self) -> bool:
        """Read once after each step, and once more at the end."""
        self._left -= 1
        return self._left <= 0
