"""Serves the page: vanilla CLIP beside TAPT, on a picture that is attacked or not.

python app.py
python app.py --backbone ViT-B-16 --device cuda
python app.py --mcp
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec

from tapt.errors import TaptError


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 65535, got {text!r}")
    return int(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line arguments; a hosting platform may set address and port by environment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--host",
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="address to serve on (default %(default)s: this computer only)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=os.environ.get("GRADIO_SERVER_PORT", "7860"),
        help="port (default %(default)s)",
    )
    parser.add_argument(
        "--backbone",
        default=os.environ.get("TAPT_BACKBONE"),
        help="tiny (embedded), ViT-B-16, hf-hub:owner/repo, ..., or several by commas for the page "
        "to choose from (default: the pack's, else tiny)",
    )
    parser.add_argument(
        "--pack",
        default=os.environ.get("TAPT_PACK"),
        help="embedded pack, folder or Hub id owner/repo (default: the backbone's own, else "
        "untrained prompts)",
    )
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument(
        "--mcp", action="store_true", help="also serve as tools of the Model Context Protocol"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the model, then serves until interrupted."""
    args = parse_args(argv)
    _share_heaps()
    if args.mcp and find_spec("mcp") is None:
        _fail('--mcp needs one more package: pip install "gradio[mcp]"')
    # imported late, so that --help and a mistyped option answer at once
    from tapt.options import DownloadBar
    from tapt.ui.service import load_service

    options = {"token": None, "progress": DownloadBar()}
    try:
        service = load_service(args.backbone, args.pack, args.device, **options)
    except TaptError as error:
        _fail(str(error))
    from tapt.ui.page import build_page, launch_options

    page = build_page(service)
    _reach_oneself()
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            prevent_thread_lock=True,
            mcp_server=args.mcp,
            show_error=args.mcp,  # an agent, too, gets the sentences that the page shows
            **launch_options(),
        )
    except OSError:
        _fail(
            f"cannot serve on {args.host}:{args.port}: the port is taken, or the address is not "
            "one of this computer. Choose another --port or --host."
        )
    page.block_thread()


def _share_heaps() -> None:
    """Holds glibc to two heaps for all threads. By itself it takes up to eight for each core, and
    every one of them keeps what the largest run in it has taken."""
    m_arena_max = -8  # malloc.h
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(m_arena_max, 2)


def _reach_oneself() -> None:
    """Keeps a proxy setting away from the call that gradio makes to its own server."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    hosts = ",".join(filter(None, [hosts, "127.0.0.1", "localhost"]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = hosts


def _fail(message: str) -> None:
    print(f"app.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
