"""Serves the page: options, the model, the address."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

from tapt.core.errors import TaptError

if TYPE_CHECKING:
    import gradio as gr

    from tapt.progress import Progress

OPTIONS = (
    (
        "--host",
        "GRADIO_SERVER_NAME",
        "127.0.0.1",
        "address to serve on (default %(default)s: this computer only)",
    ),
    ("--port", "GRADIO_SERVER_PORT", "7860", "port (default %(default)s)"),
    (
        "--backbone",
        "TAPT_BACKBONE",
        None,
        "an embedded model, ViT-B-16, hf-hub:owner/repo, ..., or several by commas for the page to "
        "choose from (default: the pack's, else an embedded one)",
    ),
    (
        "--pack",
        "TAPT_PACK",
        None,
        "embedded pack, folder or Hub id owner/repo (default: the backbone's own, else untrained "
        "prompts)",
    ),
)
ALLOW = """other {} that visitors may load: names by commas, any (public one), or none (default: any
where --host is this computer, none for other hosts and on a Space)"""


def main(argv: Sequence[str] | None = None, progress: Progress | None = None) -> None:
    """Loads the model, then serves until interrupted; what is wrong is said in one sentence, with
    exit status 2.

    progress: called with the bytes of a download that have arrived and those to come in all.
    """
    args = parse_args(argv, "tapt demo")
    launch(build(args, progress), args)


def parse_args(argv: Sequence[str] | None = None, program: str | None = None) -> argparse.Namespace:
    """Command-line arguments; a hosting platform may set some of them by environment."""
    about = "Serves the page: every defence's answer to one picture."
    parser = argparse.ArgumentParser(program, description=about)
    parser.set_defaults(program=parser.prog)
    for option, variable, default, text in OPTIONS:
        parser.add_argument(option, default=os.environ.get(variable, default), help=text)
    for what in ("backbones", "packs"):
        parser.add_argument(f"--allow-{what}", metavar="NAMES", help=ALLOW.format(what))
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    mcp = os.environ.get("GRADIO_MCP_SERVER", "").lower() == "true"
    text = "also serve tools of the Model Context Protocol"
    parser.add_argument("--mcp", action="store_true", default=mcp, help=text)
    args = parser.parse_args(argv)
    if not args.port.isdecimal() or not 1 <= int(args.port) <= 65535:
        parser.error(f"argument --port: must be a whole number from 1 to 65535, got {args.port!r}")
    args.port = int(args.port)
    private = args.host in ("127.0.0.1", "localhost", "::1") and "SPACE_ID" not in os.environ
    args.allow_backbones = args.allow_backbones or ("any" if private else "none")
    args.allow_packs = args.allow_packs or ("any" if private else "none")
    return args


def build(args: argparse.Namespace, progress: Progress | None = None) -> gr.Blocks:
    """The page with its first model loaded."""
    if find_spec("gradio") is None:
        _fail(args, 'the page needs gradio: pip install "tapt[demo]"')
    if args.mcp and find_spec("mcp") is None:
        _fail(args, '--mcp needs one more package: pip install "gradio[mcp]"')
    _share_heaps()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    # imported late, so that --help and a mistyped option answer at once
    from tapt.ui.page import build_page
    from tapt.ui.service import Service

    allowed = {"allow_backbones": args.allow_backbones, "allow_packs": args.allow_packs}
    options: dict[str, Any] = {"token": None, "progress": progress, **allowed}
    try:
        service = Service(args.backbone, args.pack, args.device, **options)
    except TaptError as error:
        _fail(args, str(error))
    return build_page(service)


def launch(page: gr.Blocks, args: argparse.Namespace) -> None:
    """Serves until interrupted."""
    from tapt.ui.page import launch_options

    reach_oneself()
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            prevent_thread_lock=True,
            mcp_server=args.mcp,
            **launch_options(),
        )
    except OSError:
        _fail(
            args,
            f"cannot serve on {args.host}:{args.port}: the port is taken, or the address is not "
            "one of this computer. Choose another --port or --host.",
        )
    page.block_thread()


def reach_oneself() -> None:
    """Keeps a proxy setting away from the call that gradio makes to its own server."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    hosts = ",".join(filter(None, [hosts, "127.0.0.1", "localhost"]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = hosts


def _share_heaps() -> None:
    """Holds glibc to two heaps for all threads. By itself it takes up to eight for each core, and
    every one of them keeps what the largest run in it has taken."""
    m_arena_max = -8  # malloc.h
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(m_arena_max, 2)


def _fail(args: argparse.Namespace, message: str) -> NoReturn:
    print(f"{args.program}: {message}", file=sys.stderr)
    sys.exit(2)
