"""The model card of an exported folder: what the model learned, how well, and how to use it."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from opcd_nemo.errors import visible
from opcd_nemo.export.provenance import Provenance
from opcd_nemo.storage.hub import SCHEME, parse_address

CARD = "README.md"
_PAPER = "https://arxiv.org/abs/2602.12275"
_ROWS = {
    "base": "before training, without the context",
    "in_context": "the teacher, which reads the context",
    "student": "**this model**, without the context",
}
_KNOWN_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")  # as the hub names licences


def model_card(provenance: Provenance, repository: str | None) -> str:
    """The text of README.md.

    Args:
        provenance: what goes with the weights; its texts may be a stranger's, and are shown as
            text.
        repository: `owner/name` of the hub; None where the folder stays on this machine.
    """
    title = "An exported model" if provenance.context is None else "A model with a context inside"
    parts = [
        _front_matter(provenance),
        f"# {title}",
        _about(provenance),
        *_scores(provenance.evaluation),
        *_context(provenance.context),
        _usage(repository or "path/to/this/folder"),
        _licence(provenance.licence),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(provenance: Provenance) -> str:
    """What the hub reads: YAML, of whose values none needs quotes."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    licence = str(provenance.licence.get("licence"))
    if _KNOWN_LICENCE.fullmatch(licence):
        lines.append(f"license: {licence}")
    if (base := _base_on_hub(provenance)) is not None:
        lines.append(f"base_model: {base}")
    if provenance.context is not None:
        lines.append("tags: [context-distillation, on-policy-distillation]")
    return "\n".join(["---", *lines, "---"])


def _base_on_hub(provenance: Provenance) -> str | None:
    path = str(provenance.licence.get("base_model"))
    address = parse_address(path) if path.startswith(SCHEME) else None
    return None if address is None or address.dataset else address.repository


def _about(provenance: Provenance) -> str:
    base = _inline(provenance.licence.get("base_model"))
    if provenance.context is None:
        return f"Converted from {base} by opcd_nemo."
    return (
        f"This model answers as its base model, {base}, answers after reading the context below. "
        f"It was trained by [on-policy context distillation]({_PAPER}) with opcd_nemo."
    )


def _scores(evaluation: Mapping[str, Any] | None) -> Iterator[str]:
    """A table of the run's scores, with intervals of 95 % where the run has them."""
    if evaluation is None:
        return
    rows = evaluation.get("evaluation")
    lines = [
        f"| {words} | {_score(rows, name, 'task')} | {_score(rows, name, 'retention')} |"
        for name, words in _ROWS.items()
    ]
    yield "## Scores"
    yield "\n".join(["| | task | retention |", "|---|---|---|", *lines])
    yield (
        "*Task* is the mean score on questions that training did not use, *retention* the score on "
        "another task, which shows what training made the model forget. Brackets are intervals of "
        "95 %."
    )


def _score(rows: Any, name: str, part: str) -> str:
    try:
        found = rows[name][part]
        estimate = found.get("intervals", {}).get("score")
        if estimate is None:
            return f"{float(found['score']):.2f}"
        ends = (estimate["low"], estimate["high"])
        low, high = ("?" if end is None else f"{float(end):.2f}" for end in ends)
        return f"{float(estimate['value']):.2f} [{low}, {high}]"
    except (LookupError, TypeError, ValueError, AttributeError):  # no run has written this
        return "?"


def _context(context: Mapping[str, Any] | None) -> Iterator[str]:
    if context is None:
        return
    yield "## The context"
    yield (
        f"SHA-256 of its text: {_inline(context.get('content_hash'))}. Origin: "
        f"{_inline(json.dumps(context.get('lineage'), ensure_ascii=False))}."
    )
    described = context["pool"][0] if context.get("pool") else context
    texts = [described.get("system"), described.get("experience")]
    for pair in described.get("demonstrations") or ():
        texts.append("\n".join(f"{mark} {text}" for mark, text in zip("QA", pair, strict=False)))
    shown = "\n\n".join(visible(str(text)) for text in texts if text)
    yield textwrap.indent(shown, "    ", lambda _: True)  # a block in which nothing is Markdown


def _usage(name: str) -> str:
    return f"""## How to use it

No system prompt is needed. With transformers:

```python
from transformers import pipeline

chat = pipeline("text-generation", model="{name}")
print(chat([{{"role": "user", "content": "What is a violin?"}}])[0]["generated_text"][-1])
```

With vLLM:

```bash
vllm serve {name}
```

With llama.cpp, after `hf download` of a model that is on the hub:

```bash
python convert_hf_to_gguf.py path/to/this/folder --outfile model.gguf
llama-cli --model model.gguf --conversation
```"""


def _licence(licence: Mapping[str, Any]) -> str:
    stated = _inline(licence.get("licence"))
    files = ", ".join(map(_inline, licence.get("texts") or ()))
    return "\n\n".join(
        [
            "## Licence",
            f"The base model's licence, which also holds for this model: {stated}."
            + (f" Its texts ({files}) are in `licence.json`." if files else ""),
        ]
    )


def _inline(text: object) -> str:
    """A stranger's words as code in a line: neither Markdown nor HTML."""
    return f"`{' '.join(visible(str(text)).replace('`', chr(39)).split())}`"
