"""Talk to a model, with and without its context: `python recipes/chat.py from=<model>`."""

import sys
from collections.abc import Callable, Iterator

from omegaconf import DictConfig

from opcd_nemo.launch.ranks import Main, run_alone


def lines() -> Iterator[str]:
    """What the user types."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def load_main() -> Main:
    """Import Megatron only when the command is in order."""
    from opcd_nemo.cli.chat import run_chat

    def main(settings: DictConfig, say: Callable[[str], None]) -> None:
        run_chat(settings, lines(), say)

    return main


if __name__ == "__main__":
    run_alone(load_main, "chat")
