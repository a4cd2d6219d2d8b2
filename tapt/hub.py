"""Files from the Hugging Face Hub, pinned to one commit."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tapt.errors import BackboneError


def snapshot(repo: str, files: list[str], revision: str | None = None) -> tuple[Path, str]:
    """Downloads exactly `files` of a model repo, or finds them in the local cache.

    repo: `owner/name`.
    revision: branch, tag or commit; default the main branch.

    Returns:
        The local folder and the commit it holds.

    Raises:
        BackboneError: no such repo, revision or file, or neither a connection nor a cached copy.
    """
    try:
        folder = Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=files)
        )
    except HFValidationError as error:
        raise BackboneError(f"{repo!r} is not a Hub id; write owner/name.") from error
    except GatedRepoError as error:
        raise BackboneError(
            f"{repo} is gated: accept its terms on the Hub and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise BackboneError(f"The Hub has no public model repo {repo}.") from error
    except RevisionNotFoundError as error:
        raise BackboneError(f"{repo} has no revision {revision!r}.") from error
    except LocalEntryNotFoundError as error:
        raise BackboneError(
            f"{repo} is not in the local cache and the Hub cannot be reached."
        ) from error
    except (huggingface_hub.errors.HTTPError, OSError, ValueError) as error:
        raise BackboneError(
            f"{repo} could not be fetched from the Hub: try again later."
        ) from error
    for file in files:
        if not (folder / file).is_file():
            raise BackboneError(f"{repo} has no {file}.")
    return folder, folder.name
