"""What is wrong with a netlist, and where."""


class SpiceError(ValueError):
    """A netlist that cannot be read or has no solution.

    The message begins with "file:line: " where a line is to blame.
    """

    def __init__(self, message: str, file: str = "", line: int = 0) -> None:
        super().__init__(f"{file}:{line}: {message}" if line else f"{file}: {message}")
        self.file = file
        self.line = line

    def __reduce__(self) -> tuple[type["SpiceError"], tuple[str], dict[str, object]]:
        return _Rebuilt, (str(self),), {"file": self.file, "line": self.line}


class _Rebuilt(SpiceError):
    """One that comes back from another process, whose message is whole."""

    def __init__(self, message: str) -> None:
        ValueError.__init__(self, message)
