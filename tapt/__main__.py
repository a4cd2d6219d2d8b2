"""The `tapt` command; also `python -m tapt`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from tapt.core.errors import InputError, TaptError

COMMANDS = {
    "predict": "attack one picture and show what vanilla CLIP and TAPT say",
    "evaluate": "accuracy with and without attack on a data set",
    "sweep": "every defence's probability of the true class against epsilon, as a plot",
    "selfcheck": "sanity rules of the attack harness, pass or fail",
    "train": "adversarial prompt tuning: make defensive prompts",
    "statistics": "token statistics for trained prompts; makes the finished pack",
    "make-pack": "all of it in one command: prompts, statistics, settings, table, card",
    "push": "publish a pack on the Hugging Face Hub",
    "convert": "make a pack of a checkpoint of the method's research code",
    "bench": "seconds and memory per image, of TAPT's step or of every defence",
    "demo": "serve the page",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status: 0, or 2 beside a sentence that says what is wrong."""
    # threads that wait for each other at every small operation stop all work on a busy computer
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv[0] if argv and argv[0] in COMMANDS else ""
    try:
        if name == "demo":
            return _demo(argv[1:])
        parser = Parser(prog="tapt", description="Test-time adversarial prompt tuning for CLIP.")
        commands = parser.add_subparsers(metavar="COMMAND", required=True)
        for each, help_text in COMMANDS.items():
            command = commands.add_parser(each, help=help_text, description=help_text)
            if each == name:  # the other commands' imports are not needed
                module = import_module(f"tapt.commands.{name.replace('-', '_')}")
                module.add_arguments(command)
        args = parser.parse_args(argv)
        status: int = module.run(args)
        return status
    except TaptError as error:
        sentence = str(error)
    except OSError as error:  # a full disk, say
        sentence = f"{error.strerror or error}."
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    print(f"{f'tapt {name}'.strip()}: {sentence}", file=sys.stderr)
    return 2


def _demo(argv: Sequence[str]) -> int:
    bars = import_module("tapt.commands.bars")
    import_module("tapt.ui.serve").main(argv, bars.download_bar())
    return 0


if __name__ == "__main__":
    sys.exit(main())
