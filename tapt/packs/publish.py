"""Publishing a pack on the Hugging Face Hub."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from tapt.core.errors import HubError, InputError, PackError
from tapt.packs import format as packs
from tapt.packs.backbones import is_public
from tapt.packs.card import PICTURE, model_card, read_notes
from tapt.packs.format import CARD, CONFIG, PROMPTS, STATISTICS
from tapt.packs.hub import HubId, ask_hub, parse_id
from tapt.packs.rows import accuracy_figure


@dataclass(frozen=True)
class Published:
    """url: of the commit, or of the proposal.
    private: whether the repo is.
    bytes: of all files.
    files: their names.
    """

    url: str
    commit: str
    private: bool
    bytes: int
    files: tuple[str, ...]


def publish(
    folder: str | os.PathLike,
    repo: str,
    *,
    public: bool = False,
    tag: str | None = None,
    create_pr: bool = False,
) -> Published:
    """Sends a pack to `owner/repo`, in one commit, with the user's own token.

    folder: of the pack, or its embedded name.
    public: make a new repo public.
    tag: name for this version, such as `v1`.
    create_pr: propose it to the repo's owner.

    Raises:
        InputError, PackError: before anything is sent.
        HubError: the Hub refuses or cannot be reached; or only the tag failed, and the message
            says so.
    """
    where = parse_id(repo)
    if where is None or where.subfolder or where.revision:
        raise InputError(f"{repo!r} is not a repo id; write owner/repo.")
    if tag is not None and (parse_id(f"{repo}@{tag}") is None or "/" in tag):
        raise InputError(f"tag must be of letters, digits and . _ -, got {tag!r}.")
    if tag and create_pr:
        raise InputError("A tag names a version of your own repo; leave it out of a proposal.")
    files = pack_files(folder, where.repo)
    if get_token() is None:
        raise HubError("There is no Hub token: log in with `hf auth login`, or set HF_TOKEN.")
    with _no_bars():
        if not create_pr:
            ask_hub(lambda: _prepare(where, public, tag), where)
        url, commit, private = ask_hub(lambda: _commit(where, files, create_pr), where)
        if tag:
            _name(where, commit, tag)
    return Published(url, commit, private, sum(map(len, files.values())), tuple(files))


def pack_files(folder: str | os.PathLike, repo: str) -> dict[str, bytes]:
    """Everything that a published pack consists of, checked; nothing else of the folder.

    Raises:
        PackError: the pack is not valid, or names a backbone that others cannot load.
    """
    pack = packs.check_pack(folder)
    source = pack.base_model["source"]
    if not is_public(source) or pack.base_model["sha256"] is None:
        raise PackError(
            f"Pack {pack.name!r} was made for {source.partition(':')[0]!r}, which others cannot "
            "load: publish the backbone and make the pack with hf-hub:owner/repo."
        )
    place = packs.pack_folder(str(folder))
    files = {CONFIG: packs.config_bytes(pack)}
    files |= {name: (place / name).read_bytes() for name in (PROMPTS, STATISTICS)}
    if pack.evaluation:
        png = io.BytesIO()
        accuracy_figure(pack.evaluation).savefig(png, format="png", metadata={"Software": None})
        files[PICTURE] = png.getvalue()
    card = model_card(pack, repo, picture=bool(pack.evaluation), notes=read_notes(place))
    return {**files, CARD: card.encode()}


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the client's bars: they also count files that are there already, as "0 files"."""
    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


def _prepare(where: HubId, public: bool, tag: str | None) -> None:
    """Makes the repo where it is not there, and refuses a taken tag before anything is sent."""
    api = HfApi()
    api.create_repo(where.repo, private=not public, exist_ok=True)
    if tag and tag in {known.name for known in api.list_repo_refs(where.repo).tags}:
        raise HubError(f"{where.repo} has a version {tag!r} already; choose another tag.")


def _name(where: HubId, commit: str, tag: str) -> None:
    try:
        ask_hub(lambda: HfApi().create_tag(where.repo, tag=tag, revision=commit), where)
    except HubError as error:
        raise HubError(
            f"The pack is published at commit {commit[:7]}, but not named {tag!r}: {error}"
        ) from error


def _commit(where: HubId, files: Mapping[str, bytes], create_pr: bool) -> tuple[str, str, bool]:
    api = HfApi()
    info = api.model_info(where.repo)
    # a buffer goes by plain HTTP, where a stall can be seen; other data by the client for Xet
    operations = [CommitOperationAdd(name, io.BytesIO(data)) for name, data in files.items()]
    for operation in operations:  # one by one: their progress is watched in this thread
        api.preupload_lfs_files(where.repo, [operation], create_pr=create_pr)
    done = api.create_commit(
        where.repo,
        operations,
        commit_message="TAPT prompts",
        parent_commit=info.sha,
        create_pr=create_pr,
    )
    return done.pr_url or done.commit_url, done.oid, bool(info.private)
