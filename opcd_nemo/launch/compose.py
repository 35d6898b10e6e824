"""From the words of a command line to a configuration; Hydra's refusals become lines."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from opcd_nemo.config.renamed import CHOICES, refuse_old_key
from opcd_nemo.config.spelling import unknown_name
from opcd_nemo.config.third_parties import refuse_unfollowed_key
from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.launch.recipes import CONF, of_program


def compose(config_name: str, words: Sequence[str]) -> DictConfig:
    """Compose `conf/<config_name>.yaml` with a command's words, as NeMo's `hydra_runner` does.

    Raises:
        UserError: a word is no `key=value`, names nothing, or has a value that cannot be read.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    OmegaConf.register_new_resolver("fast_dtype", _fast_dtype, replace=True)
    overrides = [as_override(word) for word in words]
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            composed = hydra_compose(config_name, overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(composed)  # run names interpolate Hydra's choices
        config = composed.copy()
        with open_dict(config):
            config.pop("hydra")
        _resolve(config)
    except HydraException as error:
        raise _explained(error, config_name, words) from error
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        key = str(error.full_key)
        raise UserError(key, ABSENT, "a key that exists", problem=problem) from error
    return of_program(config_name, config, words)


def _fast_dtype() -> str:
    """What `${fast_dtype:}` in a configuration means on this machine."""
    from opcd_nemo.distributed.devices import fast_dtype  # torch: not for `opcd --help`

    return fast_dtype()


def _resolve(config: DictConfig) -> None:
    """Meet interpolations that lead nowhere here, where they are the user's mistake."""
    try:
        OmegaConf.to_container(config, resolve=True)
    except InterpolationToMissingValueError:
        return  # the missing value itself is named when the configuration is read


def as_override(word: str) -> str:
    """A word of the command line as Hydra's grammar wants it.

    The rule: `~` at the start of a value is the home folder. What Hydra reads as one value keeps
    Hydra's meaning: numbers, true, null, plain and quoted texts, `[lists]`, `{mappings: 1}` and
    `${interpolations}`. Every other value is that text itself, whatever characters it has; Hydra
    alone would read `a,b` as two runs, and would refuse `a=b`, `a#b`, `(a)` and any letter
    beyond ASCII.

    Raises:
        UserError: the word is neither `key=value` nor `~key`, the value is empty or a list or
            mapping that cannot be read, the key is Hydra's, or the choice of a group is no file.
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")
    if re.match(r"hydra\b", name):
        allowed = "a key of conf/; the run's folder is exp_manager.exp_dir and name"
        raise UserError(key, value if equals else ABSENT, allowed, problem="is a key of Hydra's")
    if not equals:
        if key.startswith("~") and name:
            return word
        raise UserError(word, ABSENT, "key=value", problem="is no key with a value")
    if not name:
        raise UserError(word, ABSENT, "key=value", problem="has no key")
    if not value:
        raise UserError(key, "", f"{key}=value; the empty text is {key}=\"''\"", problem="is empty")
    _check_choice(name, value)
    if value == "~" or value.startswith("~/"):
        value = str(Path(value).expanduser())
    if _is_one_value(value):
        return f"{key}={value}"
    if (value[0], value[-1]) in {("[", "]"), ("{", "}")}:
        allowed = "[a, b] or {a: 1}, with texts of other characters in quotes, as ['~/x', 'b#c']"
        raise UserError(key, value, allowed, problem="cannot be read")
    return f"{key}={_in_quotes(value)}"


def _is_one_value(value: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if value != value.strip():
        return False
    try:
        override = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return not override.is_sweep_override()


def _in_quotes(value: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=value, quote=Quote.single).with_quotes()


def choices(group: str) -> list[str]:
    """The files of a group of `conf/`; none if no group has that name."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml")) if group else []


def _check_choice(group: str, name: str) -> None:
    """Refuse an old choice, and `group=3`, to which Hydra answers without naming the group."""
    if f"{group}={name}" in CHOICES:
        words = CHOICES[f"{group}={name}"] or f"no {group}=, as it is what conf/train.yaml says"
        raise UserError(group, name, words, problem="is an old name")
    files = choices(group)
    if files and name not in files and not (CONF / group / f"{name}.yaml").is_file():
        raise unknown_name(group, files, value=name, name=name, what=f"file in conf/{group}")


def _explained(error: Exception, config_name: str, words: Sequence[str]) -> UserError:
    unknown = re.search(
        r"Could not (?:override|delete from config\.|append) '?([\w.]+)", str(error)
    )
    if unknown is None:
        lines = [line.strip() for line in str(error).splitlines()]
        shown = [line for line in lines if line and not line.startswith(("See ", "Config search"))]
        allowed = f"key=value with a key of conf/{config_name}.yaml"
        return UserError("; ".join(shown), ABSENT, allowed)
    key = unknown[1]
    given = next((word.partition("=")[2] for word in words if word.startswith(f"{key}=")), ABSENT)
    refuse_old_key(key, given)
    refuse_unfollowed_key(key, given)
    groups = [word for word in words if choices(word.partition("=")[0])]
    composed = compose(config_name, groups)
    beside = composed
    for part in key.split(".")[:-1]:
        child = beside.get(part)
        if not isinstance(child, DictConfig):
            break
        beside = child
    every, last = list(dotted_keys(composed)), key.rpartition(".")[2]
    alike = [name for name in every if name.rpartition(".")[2] == last]
    alike = alike or difflib.get_close_matches(key, every, n=1)
    return unknown_name(key, map(str, beside), value=given, elsewhere=alike)


def dotted_keys(node: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Every key that has no keys below, as a dotted name."""
    for name in node:
        child = node._get_node(name) if isinstance(node, DictConfig) else node[name]
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from dotted_keys(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
