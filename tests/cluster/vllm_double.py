"""Stands in for vLLM on a cluster's nodes: the fake of the unit tests, for the run's own model.

Standard library alone: the server's environment has none of the run's libraries.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/engines"))
import fake_vllm


class Double(fake_vllm.FakeVllm):
    """Ends answers with the end token that the run names."""

    def complete(self, body: Any) -> tuple[int, Any]:
        """As the fake, whose end token is a constant."""
        fake_vllm.END = body["stop_token_ids"][0]
        return super().complete(body)


def main(words: list[str]) -> None:
    """Tell the version, or serve until this process is killed."""
    if words[0] == "-I":
        sys.stdout.write("0.32.0\n")
        return
    words = words[2:]  # -m, the module
    at, root, longest = (
        words[words.index(name) + 1] for name in ("--uds", "--model", "--max-model-len")
    )
    config = json.loads((Path(root) / "config.json").read_text())
    double = Double(root, vocab_size=config["vocab_size"], max_tokens=int(longest))
    with fake_vllm.Listening(double, at):
        while True:
            time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1:])
