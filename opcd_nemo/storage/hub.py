"""Models and data files on the Hugging Face hub: `hf://owner/name[@revision][/file]`.

A model's address names a repository, a data file's one file of a dataset:
`hf://datasets/owner/name[@revision]/file`. huggingface_hub fetches into its own cache and honours
HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE; with HF_HUB_OFFLINE=1 only the cache is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from opcd_nemo.errors import UserError

SCHEME = "hf://"
OFFLINE_ENV = "HF_HUB_OFFLINE"
_ADDRESS = re.compile(
    r"hf://(?P<datasets>datasets/)?(?P<repository>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>[\w.-]+))?(/(?P<file>[^@]+))?"
)
_BARE = re.compile(r"(?P<owner>\w[\w.-]*)/\w[\w.-]*")
_FOLDERS = frozenset(("models", "runs", "exports", "checkpoints", "experience"))
"""Folders that configurations name: `models/X` is a path, also where it is missing."""
_MODEL_KEYS = ("student.path", "teacher.path")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "README.md",
)
"""What is fetched of a model; README.md names its licence. Pickles and programs are never read."""
_DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_FORM = "hf://owner/name, hf://owner/name@revision, or hf://datasets/owner/name/file for data"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A repository of the hub, at a revision (None: the newest), and a file in it."""

    repository: str
    dataset: bool = False
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        """The address in the form that `parse_address` reads."""
        kind = "datasets/" if self.dataset else ""
        revision = "" if self.revision is None else f"@{self.revision}"
        file = "" if self.file is None else f"/{self.file}"
        return f"{SCHEME}{kind}{self.repository}{revision}{file}"


def parse_address(text: str) -> Address | None:
    """The address that a path is, or None for a path of this machine.

    A bare `owner/name` is an address where neither it nor the folder `owner` is on this machine.

    Raises:
        UserError: it starts as an address and is none.
    """
    if text.startswith(SCHEME):
        found = _ADDRESS.fullmatch(text)
        if found is None or ".." in text:
            raise UserError(text, allowed=_FORM, problem="no address of the hub")
        return Address(
            repository=found["repository"],
            dataset=found["datasets"] is not None,
            revision=found["revision"],
            file=found["file"],
        )
    bare = _BARE.fullmatch(text)
    if bare is None or bare["owner"] in _FOLDERS or Path(bare["owner"]).exists():
        return None
    return Address(repository=text)


def fetch_model(address: Address) -> Path:
    """The folder of a model, fetched where the cache does not have it.

    Raises:
        UserError: there is no such repository, or no network.
    """
    from huggingface_hub import snapshot_download

    if address.dataset or address.file is not None:
        raise UserError(str(address), allowed="hf://owner/name[@revision] for a model")
    found = _asked(
        address,
        lambda: snapshot_download(
            address.repository,
            revision=address.revision,
            allow_patterns=list(_MODEL_FILES),
            ignore_patterns=["*/*"],
        ),
    )
    return Path(str(found))


def fetch_file(address: Address) -> Path:
    """A data file, fetched where the cache does not have it.

    Raises:
        UserError: there is no such file, no network, or it is no file of data.
    """
    from huggingface_hub import hf_hub_download

    file = address.file
    if not address.dataset or file is None or Path(file).suffix.lower() not in _DATA_FILES:
        raise UserError(
            str(address),
            allowed=f"hf://datasets/owner/name[@revision]/file with a file that ends in "
            f"{', '.join(_DATA_FILES)}",
        )
    found = _asked(
        address,
        lambda: hf_hub_download(
            address.repository, file, repo_type="dataset", revision=address.revision
        ),
    )
    return Path(str(found))


def local_file(path: str) -> Path:
    """A data file of this machine, or of the hub, by its path or address.

    Raises:
        UserError: the address is wrong, or the file cannot be fetched.
    """
    address = parse_address(path) if path.startswith(SCHEME) else None
    return Path(path) if address is None else fetch_file(address)


def resolve_commit(address: Address) -> Address:
    """The address at the commit that it names today (offline: the newest one in the cache).

    Raises:
        UserError: there is no such repository, or no network.
    """
    path = fetch_file(address) if address.dataset else fetch_model(address)
    # the cache keeps a commit's files under snapshots/<commit>/
    (commit,) = (part for part in path.parts if _COMMIT.fullmatch(part))
    return replace(address, revision=commit)


def at_commit(path: str) -> str:
    """A path as it is; an address at the commit that it names now.

    Raises:
        UserError: the address is wrong, there is no such repository, or no network.
    """
    address = parse_address(path)
    return path if address is None else str(resolve_commit(address))


def upload_model(folder: Path, address: Address) -> str:
    """Put a folder into a repository; a repository that does not exist is created, private.

    The token is that of huggingface_hub's login. Returns the commit's page.

    Raises:
        UserError: the hub refuses, or no network.
    """
    from huggingface_hub import HfApi

    api = HfApi()

    def upload() -> str:
        api.create_repo(address.repository, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=address.repository,
            folder_path=folder,
            revision=address.revision,
            commit_message="opcd export",
        )
        return str(done.commit_url)

    return _asked(address, upload)


def addresses(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key of a run's plain configuration whose value is an address, and the address.

    `owner/name` without `hf://` is an address at keys that name a model.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from addresses(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, str):
        is_bare = key in _MODEL_KEYS and not Path(config).expanduser().exists()
        if config.startswith(SCHEME) or (is_bare and parse_address(config) is not None):
            yield key, config


def is_offline() -> bool:
    """Whether only the cache may be read."""
    return os.environ.get(OFFLINE_ENV, "").upper() in ("1", "ON", "YES", "TRUE")


def _asked(address: Address, ask: Callable[[], _T]) -> _T:
    """What the hub answers; what goes wrong on the way is the user's to mend, in one line."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return ask()
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            str(address),
            allowed="a repository that the hub shows you (private and gated ones: `hf auth login`)",
            problem="the hub does not show this repository",
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            str(address), allowed="a revision of the repository", problem="no such revision"
        ) from error
    except LocalEntryNotFoundError as error:
        raise _not_reached(address, error) from error
    except EntryNotFoundError as error:
        raise UserError(
            str(address), allowed="a file of the repository", problem="no such file"
        ) from error
    except OSError as error:
        raise _not_reached(address, error) from error


def _not_reached(address: Address, error: Exception) -> UserError:
    """Neither the cache nor the network has it: what to do about that."""
    problem = f"not in the cache, and {OFFLINE_ENV} is set"
    if not is_offline():
        problem = f"the hub cannot be asked ({_first_line(error)})"
    return UserError(
        str(address),
        allowed="a folder of this machine, or the address once it is in the cache: on a machine "
        f"with network `hf download {address.repository}`, then copy HF_HOME and set "
        f"{OFFLINE_ENV}=1",
        problem=problem,
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
