"""`python -m tapt push DIR owner/repo`: publishes a pack on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import disable_progress_bars

from tapt.backbone import is_public
from tapt.card import PICTURE, model_card
from tapt.errors import HubError, InputError, PackError
from tapt.hub import HubId, ask_hub, parse_id
from tapt.pack import CARD, CONFIG, PROMPTS, STATISTICS, Pack, check_pack, pack_folder, read_notes
from tapt.report import attack_name, epsilon_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the pack")
    parser.add_argument("repo", metavar="owner/repo", help="model repo; made if it is not there")
    public = parser.add_mutually_exclusive_group()
    public.add_argument("--public", action="store_true", help="make a new repo public")
    public.add_argument("--private", action="store_true", help="make a new repo private (default)")
    parser.add_argument("--tag", help="name for this version, such as v1")
    parser.add_argument("--create-pr", action="store_true", help="propose it to the repo's owner")


def run(args: argparse.Namespace) -> int:
    where = parse_id(args.repo)
    if where is None or where.subfolder or where.revision:
        raise InputError(f"{args.repo!r} is not a repo id; write owner/repo.")
    if args.tag and (parse_id(f"{args.repo}@{args.tag}") is None or "/" in args.tag):
        raise InputError(f"--tag must be of letters, digits and . _ -, got {args.tag!r}.")
    if args.tag and args.create_pr:
        raise InputError("--tag names a version of your own repo; leave it out with --create-pr.")
    files = pack_files(args.folder, where.repo)
    if get_token() is None:
        raise HubError("There is no Hub token: log in with `hf auth login`, or set HF_TOKEN.")
    disable_progress_bars()  # they also count files that are there already, as "0 files"
    if not args.create_pr:
        ask_hub(lambda _: _ready(where, args.public, args.tag), where)
    url, commit, private = ask_hub(lambda _: _commit(where, files, args.create_pr), where)
    print(f"{sum(map(len, files.values())) / 1e6:.1f} MB in {len(files)} files: {url}")
    if args.create_pr:
        return 0
    if args.tag:
        _name(where, commit, args.tag)
    print(f"The repo is {'private' if private else 'public'}. Load it with")
    print(f"  python app.py --pack {where.repo}@{args.tag or commit}")
    return 0


def pack_files(folder: Path, repo: str) -> dict[str, bytes]:
    """Everything that a published pack consists of, checked; nothing else of the folder.

    Raises:
        PackError: the pack is not valid, or names a backbone that others cannot load.
    """
    pack = check_pack(folder)
    source = pack.base_model["source"]
    if not is_public(source) or pack.base_model["sha256"] is None:
        raise PackError(
            f"Pack {pack.name!r} was made for {source.partition(':')[0]!r}, which others cannot "
            "load: publish the backbone and make the pack with hf-hub:owner/repo."
        )
    folder = pack_folder(str(folder))
    files = {name: (folder / name).read_bytes() for name in (CONFIG, PROMPTS, STATISTICS)}
    if pack.evaluation:
        files[PICTURE] = accuracy_picture(pack)
    card = model_card(pack, repo, picture=bool(pack.evaluation), notes=read_notes(folder))
    files[CARD] = card.encode()
    return files


def accuracy_picture(pack: Pack) -> bytes:
    """The table of the card as a PNG: attacked accuracy with its interval, and clean accuracy."""
    from matplotlib.figure import Figure

    rows = pack.evaluation
    figure = Figure((8, 1.2 + 0.4 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots()
    attacked = [100 * row["accuracy"] for row in rows]
    clean = [100 * row["clean_accuracy"] for row in rows]
    spread = [[abs(100 * row["ci95"][i] - 100 * row["accuracy"]) for row in rows] for i in (0, 1)]
    axes.barh(range(len(rows)), attacked, xerr=spread, color="#4f46e5", label="attacked, 95 %")
    axes.plot(clean, range(len(rows)), "D", color="#d97706", label="clean")
    labels = [
        f"{row['defense']}\n{attack_name(row)} on {row['threat']}, {epsilon_name(row)}, "
        f"n={row['n']}"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, %")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _ready(where: HubId, public: bool, tag: str | None) -> None:
    """Makes the repo where it is not there, and refuses a taken tag before anything is sent."""
    api = HfApi()
    api.create_repo(where.repo, private=not public, exist_ok=True)
    if tag and tag in {known.name for known in api.list_repo_refs(where.repo).tags}:
        raise HubError(f"{where.repo} has a version {tag!r} already; choose another --tag.")


def _name(where: HubId, commit: str, tag: str) -> None:
    try:
        ask_hub(lambda _: HfApi().create_tag(where.repo, tag=tag, revision=commit), where)
    except HubError as error:
        raise HubError(
            f"The pack is published at commit {commit[:7]}, but not named {tag!r}: {error}"
        ) from error


def _commit(where: HubId, files: dict[str, bytes], create_pr: bool) -> tuple[str, str, bool]:
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
