"""Errors that end a command with one line, and the end that SIGTERM asks for.

Everything that is the user's to mend is a UserError: its message is
one line that says what is wrong and what to do. main.py prints it
and exits with its status; in a notebook it is a ValueError.
"""


class UserError(ValueError):
    """One line for the user; exit status 2: the same command would fail again.

    agreed: with several processes, all raise it at the same place,
    so that none is left waiting.
    """

    status = 2

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


class DataError(UserError):
    """Real images are missing, damaged or do not fit the configuration."""


class StorageError(UserError):
    """Something cannot be written, such as on a full disk. Exit status 1: trying again may help."""

    status = 1


class Stopped(Exception):
    """SIGTERM was answered: everything is saved, the same command continues."""


def one_line(error: BaseException, most: int = 300) -> str:
    """The message of a foreign error on one line; of more than `most`, beginning and end."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most // 2 - 3]} ... {text[-(most // 2 - 2) :]}"
