"""Publishing a pack on the Hugging Face Hub."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from tapt.core.errors import HubError, InputError, PackError
from tapt.packs.backbones import is_public
from tapt.packs.card import PICTURE, model_card, read_notes
from tapt.packs.client import ask_hub
from tapt.packs.format import (
    CARD,
    CONFIG,
    PROMPTS,
    STATISTICS,
    config_bytes,
    open_pack,
    pack_folder,
)
from tapt.packs.hub import parse_id
from tapt.packs.rows import accuracy_figure


@dataclass(frozen=True)
class Published:
    """url: of the commit, or of the proposal; private: whether the repo is; bytes: of all files."""

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

    Raises `InputError` and `PackError` before anything is sent; `HubError` where the Hub refuses or
    cannot be reached, or where only the tag failed, as its message then says.
    """
    check_target(repo)
    if tag is not None and (parse_id(f"{repo}@{tag}") is None or "/" in tag):
        raise InputError(f"tag must be of letters, digits and . _ -, got {tag!r}.")
    if tag and create_pr:
        raise InputError("A tag names a version of your own repo; leave it out of a proposal.")
    files = pack_files(folder, repo)
    if not create_pr:
        ask_hub(lambda: _prepare(repo, public, tag), repo)
    url, commit, private = ask_hub(lambda: _commit(repo, files, create_pr), repo)
    if tag:
        try:
            ask_hub(lambda: HfApi().create_tag(repo, tag=tag, revision=commit), repo)
        except HubError as error:
            raise HubError(
                f"The pack is published at commit {commit[:7]}, but not named {tag!r}: {error}"
            ) from error
    return Published(url, commit, private, sum(map(len, files.values())), tuple(files))


def check_target(repo: str) -> None:
    """Asked before any work: `InputError` for what is not `owner/repo`, `HubError` without a
    token."""
    where = parse_id(repo)
    if where is None or where.subfolder or where.revision:
        raise InputError(f"{repo!r} is not a repo id; write owner/repo.")
    if get_token() is None:
        raise HubError("There is no Hub token: log in with `hf auth login`, or set HF_TOKEN.")


def pack_files(folder: str | os.PathLike, repo: str) -> dict[str, bytes]:
    """Everything that a published pack consists of, checked; nothing else of the folder.
    `PackError` for a faulty pack, and for one with a backbone that others cannot load."""
    place = pack_folder(str(folder))
    if not place.is_dir():
        raise PackError(f"There is no folder {str(folder)!r} with a pack.")
    pack = open_pack(folder).read()
    source = pack.base_model["source"]
    if not is_public(source) or pack.base_model["sha256"] is None:
        raise PackError(
            f"Pack {pack.name!r} was made for {source.partition(':')[0]!r}, which others cannot "
            "load: publish the backbone and make the pack with hf-hub:owner/repo."
        )
    files = {CONFIG: config_bytes(pack)}
    files |= {name: (place / name).read_bytes() for name in (PROMPTS, STATISTICS)}
    if pack.evaluation:
        png = io.BytesIO()
        accuracy_figure(pack.evaluation).savefig(png, format="png", metadata={"Software": None})
        files[PICTURE] = png.getvalue()
    card = model_card(pack, repo, picture=bool(pack.evaluation), notes=read_notes(place))
    return {**files, CARD: card.encode()}


def _prepare(repo: str, public: bool, tag: str | None) -> None:
    """Makes the repo where it is not there, and refuses a taken tag before anything is sent."""
    api = HfApi()
    api.create_repo(repo, private=not public, exist_ok=True)
    if tag and tag in {known.name for known in api.list_repo_refs(repo).tags}:
        raise HubError(f"{repo} has a version {tag!r} already; choose another tag.")


def _commit(repo: str, files: Mapping[str, bytes], create_pr: bool) -> tuple[str, str, bool]:
    api = HfApi()
    info = api.model_info(repo)
    # a buffer goes by plain HTTP, where a stall can be seen; other data by the client for Xet
    operations = [CommitOperationAdd(name, io.BytesIO(data)) for name, data in files.items()]
    for operation in operations:  # one by one: their progress is watched in this thread
        api.preupload_lfs_files(repo, [operation], create_pr=create_pr)
    done = api.create_commit(
        repo, operations, commit_message="TAPT prompts", create_pr=create_pr, parent_commit=info.sha
    )
    return done.pr_url or done.commit_url, done.oid, bool(info.private)
