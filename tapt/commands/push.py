"""`tapt push DIR owner/repo`: publishes a pack on the Hugging Face Hub."""

from __future__ import annotations

import argparse

from tapt.commands.options import filled
from tapt.packs.publish import publish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=filled, help="folder of the pack")
    parser.add_argument("repo", metavar="owner/repo", help="model repo; made if it is not there")
    public = parser.add_mutually_exclusive_group()
    public.add_argument("--public", action="store_true", help="make a new repo public")
    public.add_argument("--private", action="store_true", help="make a new repo private (default)")
    parser.add_argument("--tag", type=filled, help="name for this version, such as v1")
    parser.add_argument("--create-pr", action="store_true", help="propose it to the repo's owner")


def run(args: argparse.Namespace) -> int:
    """Says where the pack is, and how to load it."""
    options = {"public": args.public, "tag": args.tag, "create_pr": args.create_pr}
    done = publish(args.folder, args.repo, **options)
    print(f"{done.bytes / 1e6:.1f} MB in {len(done.files)} files: {done.url}")
    if not args.create_pr:
        print(f"The repo is {'private' if done.private else 'public'}. Load it with")
        print(f"  tapt demo --pack {args.repo}@{args.tag or done.commit}")
    return 0
