"""Secrets of a configuration stay out of files: a run needs their values, its records do not.

The rule: the value of a key that ends in token, key, secret or password, in any case and at any
depth, is a secret, and so is what `${oc.env:NAME}` gives for a variable whose name ends so. The
names of a tokenizer's special tokens end so too and are none. Long secrets are also left out where
they are a part of another value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

HIDDEN = "<secret>"
_ENDING = re.compile(r"(token|key|secret|password)$", re.IGNORECASE)
_SPECIAL_TOKENS = re.compile(r"(bos|eos|pad|unk|sep|cls|mask)_token")
_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)")
_OTHER_KEY = re.compile(r"\$\{([\w.]+)\}")
_MIN_LETTERS = 8  # of a secret that is searched in other values; shorter ones may be words there


def is_secret(name: object) -> bool:
    """Whether a key's value, or an environment variable's, is a secret."""
    text = str(name)
    return _ENDING.search(text) is not None and _SPECIAL_TOKENS.fullmatch(text) is None


def recorded(config: DictConfig) -> dict[str, Any]:
    """A configuration's values, resolved, as files may hold them."""
    hiding = _Hiding(OmegaConf.to_container(config, resolve=False))
    values = hiding.hide(OmegaConf.to_container(config, resolve=True), hiding.root)
    kept: dict[str, Any] = hiding.cut(values)
    return kept


def without_secrets(values: Any) -> Any:
    """Plain values as files may hold them, where nothing is known of variables."""
    hiding = _Hiding()
    return hiding.cut(hiding.hide(values))


def words_without_secrets(words: Sequence[str], config: DictConfig) -> list[str]:
    """The words of a command line, in Hydra's grammar, as files may hold them."""
    hiding = _Hiding(OmegaConf.to_container(config, resolve=False))
    hiding.hide(OmegaConf.to_container(config, resolve=True), hiding.root)
    return [hiding.cut(_word(word, hiding)) for word in words]


def _word(word: str, hiding: _Hiding) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, text = word.partition("=")
    if equals and text and is_secret(key):
        return f"{key}={HIDDEN}"
    if not text.startswith(("{", "[")):
        return word
    try:
        value = OverridesParser.create().parse_override(word).value()
    except HydraException:
        return word
    kept = hiding.hide(value)
    return word if kept == value else f"{key}={json.dumps(kept, default=str)}"


class _Hiding:
    """Leaves secrets out of values, and remembers the long ones.

    Attributes:
        root: the configuration whose values these are, before its interpolations were resolved.
    """

    def __init__(self, root: Any = None) -> None:
        self.root = root
        self._texts: set[str] = set()

    def hide(self, value: Any, given: Any = None) -> Any:
        """A value without the secrets below it; `given` is the value's original in `root`."""
        given = self._followed(given)
        if isinstance(value, Mapping):
            inside = given if isinstance(given, Mapping) else {}
            return {
                name: self._hidden(part) if is_secret(name) else self.hide(part, inside.get(name))
                for name, part in value.items()
            }
        if isinstance(value, list | tuple):
            origins = given if isinstance(given, list) else [None] * len(value)
            return [self.hide(part, origin) for part, origin in zip(value, origins, strict=True)]
        if isinstance(given, str) and any(map(is_secret, _VARIABLE.findall(given))):
            return self._hidden(value)
        return value

    def _followed(self, given: Any) -> Any:
        """What an interpolation that is another key's value leads to."""
        while isinstance(given, str) and (key := _OTHER_KEY.fullmatch(given)) is not None:
            given = self.root
            for name in key[1].split("."):
                given = given.get(name) if isinstance(given, Mapping) else None
        return given

    def _hidden(self, value: Any) -> Any:
        """The replacement of a secret; switches, null and empty values are no secrets."""
        if value is None or isinstance(value, bool) or value in ("", {}, []):
            return value
        self._remember(value)
        return HIDDEN

    def _remember(self, value: Any) -> None:
        if isinstance(value, Mapping | list | tuple):
            for part in value.values() if isinstance(value, Mapping) else value:
                self._remember(part)
        elif isinstance(value, str) and len(value) >= _MIN_LETTERS and value != HIDDEN:
            self._texts.add(value)

    def cut(self, value: Any) -> Any:
        """A value without the long secrets, wherever they stand."""
        if isinstance(value, Mapping):
            return {name: self.cut(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self.cut(part) for part in value]
        if isinstance(value, str):
            for text in sorted(self._texts, key=len, reverse=True):
                value = value.replace(text, HIDDEN)
        return value


def hidden_keys(values: Any, key: str = "") -> Iterator[str]:
    """The dotted keys whose values were left out when the values were recorded."""
    if isinstance(values, Mapping | list):
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        for name, part in pairs:
            yield from hidden_keys(part, f"{key}.{name}" if key else str(name))
    elif isinstance(values, str) and HIDDEN in values:
        yield key
