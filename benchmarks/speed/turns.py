"""Processes that take turns: one works while the others wait, so that what drifts on a machine meets all of them alike."""

import json
import subprocess
import sys
from collections.abc import Callable


class Contender:
    """A process that answers questions, one after the other.

    Args:
      module: the module it runs.
      *arguments: the module's arguments; with them it must come to `answer`.
    """

    def __init__(self, module: str, *arguments: str):
        command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: str) -> dict | None:
        """Its answer; None if it failed."""
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return None

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def answer(function: Callable[[str], dict]) -> None:
    """Answers the questions from standard input with what a function returns; what else is printed goes to standard error."""
    output, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        output.write(json.dumps(function(line.strip())) + "\n")
        output.flush()
