"""Where a model comes from: its context, its scores, the licence of its base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_nemo.config import limits
from opcd_nemo.config.plugs import build_plug
from opcd_nemo.context.sources import Context, ContextSource, content_hash
from opcd_nemo.errors import UserError
from opcd_nemo.formats.gguf import GgufFile
from opcd_nemo.formats.locate import model_kind, read_json, resolve_model_path
from opcd_nemo.formats.nemo import (
    CONTEXT,
    EVALUATION,
    LICENCE,
    base_path,
    open_package,
    read_checkpoint,
    read_record,
)
from opcd_nemo.storage.plain_file import read_bounded

SUMMARY = "summary.json"  # of a run
_LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What goes with weights wherever they go; plain values.

    `context`: system, demonstrations, content_hash and lineage (who wrote it, from what); None when
    the model was not distilled here. `evaluation`: the run's summary. `licence`: of the base model.
    """

    context: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    licence: dict[str, Any]

    def files(self) -> dict[str, dict[str, Any]]:
        """As the files of a package."""
        named = {CONTEXT: self.context, EVALUATION: self.evaluation, LICENCE: self.licence}
        return {name: values for name, values in named.items() if values is not None}


def read_provenance(path: str) -> Provenance:
    """What is known of the model at `path`.

    Raises:
        UserError: the model does not exist, or cannot be read.
    """
    found = resolve_model_path(path)
    kind = model_kind(found)
    if kind == "nemo":
        files = open_package(found)
        names = files.sizes()
        records = {
            name: read_record(files, name) if name in names else None
            for name in (CONTEXT, EVALUATION, LICENCE)
        }
        return Provenance(
            context=records[CONTEXT],
            evaluation=records[EVALUATION],
            licence=records[LICENCE] or _not_stated(path),
        )
    if kind == "checkpoint":
        checkpoint = read_checkpoint(found)
        return Provenance(
            context=checkpoint.context,
            evaluation=_run_summary(found, checkpoint.step),
            licence=base_licence(path),
        )
    return Provenance(context=None, evaluation=None, licence=base_licence(path))


def describe_context(plug: Mapping[str, Any]) -> dict[str, Any]:
    """A configured context with its hash and lineage; of a pool every context."""
    source: ContextSource = build_plug(dict(plug))
    described = [_described(context) for context in source.contexts()]
    if len(described) == 1:
        return {**described[0], "lineage": dict(source.lineage)}
    return {
        "pool": described,
        "content_hash": content_hash(source),
        "lineage": dict(source.lineage),
    }


def _described(context: Context) -> dict[str, Any]:
    return {
        "system": context.system,
        "demonstrations": [list(pair) for pair in context.demonstrations],
        "experience": context.experience,
        "wrap": context.wrap,
        "content_hash": context.content_hash,
    }


def as_context(described: Mapping[str, Any], where: str) -> Context:
    """The inverse of `describe_context`; of a pool the first context.

    Raises:
        UserError: `describe_context` makes no such value, or the hash differs from the content's.
    """
    try:
        described = described["pool"][0] if "pool" in described else described
        pairs = described["demonstrations"]
        context = Context(
            system=_text(described["system"]),
            demonstrations=tuple((str(question), str(answer)) for question, answer in pairs),
            experience=_text(described.get("experience")),
            wrap=_text(described.get("wrap")),
        )
        stated = described["content_hash"]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            where, allowed="a context", problem=f"cannot be read ({error!r})"
        ) from error
    if context.content_hash != stated:
        raise UserError(
            where,
            allowed=f"that of its text, {context.content_hash}",
            problem=f"content_hash is {stated}",
        )
    return context


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def base_licence(path: str) -> dict[str, Any]:
    """The licence that the base model's files state, and the texts of its licence files.

    Raises:
        UserError: the base model does not exist.
    """
    base = base_path(path)
    found = resolve_model_path(base)
    kind = model_kind(found)
    if kind == "nemo":
        return read_provenance(str(found)).licence
    if kind == "gguf":
        stated, texts = GgufFile(found).metadata.get("general.license"), {}
    else:
        stated = _front_matter(found / "README.md").get("license")
        texts = {
            name: _readable(found / name) for name in _LICENCE_FILES if (found / name).is_file()
        }
    return {"base_model": base, "licence": stated or "not stated", "texts": texts}


def _not_stated(path: str) -> dict[str, Any]:
    return {"base_model": path, "licence": "not stated", "texts": {}}


def _readable(path: Path) -> str:
    return read_bounded(path, limits.SETTINGS_BYTES).decode(errors="replace")


def _front_matter(readme: Path) -> dict[str, str]:
    """The `key: value` lines between the `---` of a model card."""
    if not readme.is_file():
        return {}
    head = _readable(readme).split("---")
    lines = head[1].splitlines() if len(head) > 2 and not head[0].strip() else []
    pairs = (line.partition(":") for line in lines if ":" in line and not line.startswith(" "))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _run_summary(checkpoint: Path, step: int) -> dict[str, Any] | None:
    """The summary of the checkpoint's run, if the summary is about this step's weights."""
    file = checkpoint.parent.parent / SUMMARY
    summary = read_json(file) if file.is_file() else {}
    return summary if summary.get("steps") == step else None
