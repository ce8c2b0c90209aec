"""A Python process of its own for a figure that the first of its kind must give; what it prints last is the answer."""

import json
import os
import signal
import subprocess
import sys

from dax.errors import DaxError


def answer(bench: str, code: str, arguments: list[str], **environment: str) -> dict:
    """The JSON object that `code` prints last. DaxError("check_failed") with its last words if it fails."""
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if ended.returncode:
        raise DaxError("check_failed", f"bench {bench}: {ending(ended, -1)}")
    return json.loads(ended.stdout.splitlines()[-1])


def ending(ended: subprocess.CompletedProcess, line: int) -> str:
    """Why a program failed: that line of its complaint, else how it ended."""
    if lines := [words for each in ended.stderr.splitlines() if (words := each.strip())]:
        return lines[line]
    if ended.returncode < 0:
        return f"ended by {signal.Signals(-ended.returncode).name}"
    return f"ended with status {ended.returncode}"
