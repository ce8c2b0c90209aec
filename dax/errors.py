"""Every failure DAX foresees, with the exit code a shell sees.

One exception type: what, where, the value, the way out, in one line. `code` is stable and machine-readable.
"""

EXIT_CODES = {
    "bug": 1,  # anything unforeseen
    "bad_request": 2,  # arguments, request or plan
    "bad_model": 3,  # model or checkpoint invalid
    "unsupported": 4,  # this machine cannot do that
    "out_of_memory": 5,
    "cannot_write": 6,  # the output
    "rank_failed": 7,  # a rank died, hung or disagreed
    "check_failed": 8,  # a numerical check
    "interrupted": 130,  # SIGINT
    "terminated": 143,  # SIGTERM
}


class DaxError(Exception):
    """A foreseen failure. `code` is a key of EXIT_CODES; `exit_code` what a process ends with."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
        self.exit_code = EXIT_CODES[code]


def nearest(word: str, known) -> str:
    """The way out for a misspelt word: ", did you mean 'x'?" or the list of known ones."""
    import difflib

    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
