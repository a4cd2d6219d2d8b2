"""`python -m tapt COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys

from tapt.errors import TaptError

COMMANDS = {
    "predict": "attack one picture and show what vanilla CLIP and TAPT say",
    "evaluate": "accuracy with and without attack on a data set",
    "sweep": "every defence's probability of the true class against epsilon, as a plot",
    "selfcheck": "sanity rules of the attack harness, pass or fail",
    "train": "adversarial prompt tuning: make defensive prompts",
    "statistics": "token statistics for trained prompts; makes the finished pack",
    "push": "publish a pack on the Hugging Face Hub",
    "convert": "make a pack of a checkpoint of the method's research code",
    "bench": "seconds and memory per image, beside the straightforward path",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tapt", description="TAPT for CLIP.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if argv[:1] == [name]:  # the other commands' imports are not needed
            importlib.import_module(f"tapt.{name}").add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return importlib.import_module(f"tapt.{args.command}").run(args)
    except TaptError as error:
        print(f"tapt {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
