"""A model that answers: `opcd chat` as a function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opcd_nemo.api.process import borrowed_process
from opcd_nemo.api.words import word
from opcd_nemo.cli.chat import Chat, open_chat
from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose


class ChatModel:
    """A loaded model, which answers every question without the questions before."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def chat(self, question: str, *, with_context: bool = False) -> str:
        """The model's answer, without blanks at its ends.

        Args:
            question: what the user says.
            with_context: whether the model also reads the context that it was distilled from, or
                the `system` of `load_model`.

        Raises:
            UserError: the question is too long for the model, or no context is known.
        """
        if with_context and self._chat.context is None:
            allowed = "False, or load_model(path, system=...)"
            raise UserError("with_context", True, allowed, problem="the model has no context")
        self._chat.reset()
        (reply,) = self._chat.replies(question, (with_context,))
        return reply.text


def load_model(
    path: str | Path,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    settings: Sequence[str] = (),
) -> ChatModel:
    """Load a model into this process.

    Args:
        path: what `from=` of `opcd chat` takes: `run.student`, a Hugging Face folder, a GGUF or
            `.nemo` file, `hf://owner/name`.
        system: a system prompt as the context; None: the context that the model was distilled from.
        max_new_tokens: the longest answer, in tokens.
        settings: other keys of `opcd chat`, each as on its command line:
            `["sampling.temperature=0.7"]`.

    Raises:
        UserError: a key is wrong, before the model loads.
    """
    words = [
        word("from", path),
        word("system", system),
        word("sampling.max_new_tokens", max_new_tokens),
        *settings,
    ]
    with borrowed_process(words, quiet=True):
        return ChatModel(open_chat(compose("chat", words)))
