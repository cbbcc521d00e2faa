"""The Hub over the network: listings, downloads and search by its own client, its errors in our words.

HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HOME are honoured. The client is imported only where it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen import cache, safety
from vgen.errors import VgenError

HTTP = {"httpx2": "HTTPError", "httpx": "HTTPError", "requests": "RequestException"}  # by the client's version
OFFLINE = "Run once with a network, or name a folder with --checkpoint DIR, or the small one with --checkpoint demo."


def page(repo: str) -> str:
    """The address of a repository, for people."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{repo}"


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class Listing:
    """The files of a commit: their hashes as "sha256:..." or "git:...", and their sizes in bytes."""

    commit: str
    files: dict[str, str]
    sizes: dict[str, int]


@contextmanager
def talking(repo: str, revision: str = "main") -> Iterator[None]:
    """Turn the client's errors about a repository into VgenErrors that say what to do."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise VgenError(
            f"{repo} is gated: its owner wants you to agree to terms first.",
            f"Agree at {page(repo)}, then log in: hf auth login (or set HF_TOKEN).",
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise VgenError(
            f"{repo} does not exist on the Hub, or is private.",
            "Check the name; for a private one log in: hf auth login (or set HF_TOKEN).",
        ) from error
    except hub.RevisionNotFoundError as error:
        raise VgenError(
            f"{repo} has no revision '{revision}'.", f"Its branches and tags: {page(repo)}/tree/main"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if offline() else "the Hub cannot be reached"
        raise VgenError(f"{repo}@{revision} is not in the cache ({cache.hub()}), and {why}.", OFFLINE) from error
    except hub.HfHubHTTPError as error:
        raise _refusal(repo, error) from error
    except _network() as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise VgenError(
            f"{repo}@{revision} is not complete in the cache ({cache.hub()}), and the Hub cannot be reached: {reason}.",
            "What arrived whole is kept: run it again. Without a network there is --checkpoint demo.",
        ) from error


def _network() -> tuple[type[Exception], ...]:
    """The errors of whichever HTTP library the client uses."""
    return tuple(getattr(sys.modules[name], error) for name, error in HTTP.items() if name in sys.modules)


def _refusal(repo: str, error: Any) -> VgenError:
    """What an HTTP status means, and what to do about it."""
    status = getattr(error.response, "status_code", 0)
    told = str(getattr(error, "server_message", "") or error).partition("\n")[0]
    do = {
        401: "Log in with a valid token: hf auth login (or set HF_TOKEN).",
        403: "Use a token that may write there, or another owner: hf auth login (or set HF_TOKEN).",
        412: "Someone else has pushed since. Look at the changes there, then push again.",
        405: "This server only serves downloads, as mirrors do: unset HF_ENDPOINT, or name one that takes uploads.",
        409: "A tag never moves: choose the next one, such as v1.0.1.",
        429: "Too many requests: wait some minutes, and log in, which raises the limit.",
    }.get(status, "Run it again later; the Hub's state: https://status.huggingface.co")
    return VgenError(f"The Hub refused {repo} ({status}): {told}", do)


def listing(repo: str, revision: str = "main") -> Listing:
    """The files of a revision, without a download. Raises VgenError."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with talking(repo, revision):
        api = HfApi()
        commit = revision if cache.COMMIT.fullmatch(revision) else str(api.model_info(repo, revision=revision).sha)
        tree = [one for one in api.list_repo_tree(repo, revision=commit, recursive=True) if isinstance(one, RepoFile)]
    files = {one.path: f"sha256:{one.lfs.sha256}" if one.lfs else f"git:{one.blob_id}" for one in tree}
    return Listing(commit, files, {one.path: one.size for one in tree})


def fetch(repo: str, revision: str = "main", subfolder: str = "") -> Path:
    """Download what is safe of a repository, or of a folder in it; gives the folder of the commit in the cache.

    A listing with pickled weights or a path that leads out is refused before anything is fetched; every file is
    compared with its hash after. Raises VgenError.
    """
    from huggingface_hub import snapshot_download

    inside = f"{subfolder}/" if subfolder else ""
    what = f"{repo}@{revision}"
    if not offline():
        names = listing(repo, revision).files
        safety.refuse_names((n.removeprefix(inside) for n in names if n.startswith(inside)), what)
    with talking(repo, revision):
        wanted = [f"{inside}{pattern}" for pattern in cache.SAFE]
        base = Path(
            snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=list(cache.COPIES))
        )
    check(base, what)
    safety.refuse_code(base / subfolder, what)
    return base


def check(base: Path, what: str) -> None:
    """Compare the files of a cached commit with their hashes, once. Damaged ones are deleted. Raises VgenError.

    A file that is as the Hub has it, but not as the repository's own vgen.json tells, stays: no download mends that.
    """
    faults = cache.check(base)
    damaged = [fault for fault in faults if fault.damaged]
    for fault in damaged:
        _forget(base / fault.path)
    for fault in damaged:
        raise VgenError(
            f"{what} arrived damaged: {fault.path}: {fault.reason}",
            f"That file was deleted. Fetch it again: vgen checkpoints pull {what}",
        )
    for fault in faults:
        raise contradiction(what, fault)


def contradiction(what: str, fault: cache.Fault) -> VgenError:
    """What to say of a repository whose vgen.json tells other hashes than its files have."""
    return VgenError(
        f"{what} contradicts itself: {fault.path} arrived whole, but {fault.reason}",
        "Fetching it again cannot mend it. Take another revision, or ask its owner to push it again with"
        " 'vgen checkpoints push', which writes the hashes.",
    )


def _forget(path: Path) -> None:
    """Delete a cached file: the link of the snapshot, and every link and blob behind it."""
    while path.is_symlink():
        behind = path.parent / path.readlink()
        path.unlink()
        path = behind
    path.unlink(missing_ok=True)


def left_out(base: Path) -> list[str]:
    """Files of a commit in the cache that were not fetched because of their kind."""
    return sorted(set(safety.odd(cache.listing(base))))


def search(words: str, tags: list[str], author: str = "", limit: int = 20) -> list[dict[str, Any]]:
    """Models of the Hub that have all of `tags`: repository, tags, downloads, date. Raises VgenError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with talking("the list of models"):
        try:
            found = list(
                HfApi().list_models(search=words or None, filter=tags, author=author or None, limit=limit, full=True)
            )
        except RepositoryNotFoundError as error:
            raise VgenError(
                f"{page('')} does not list models, as many mirrors do not.", "Search without HF_ENDPOINT."
            ) from error
        return [
            {
                "checkpoint": one.id,
                "tags": list(one.tags or []),
                "downloads": one.downloads or 0,
                "changed": one.last_modified.date().isoformat() if one.last_modified else "",
                "private": bool(one.private),
                "revision": one.sha or "",
            }
            for one in found
        ]
