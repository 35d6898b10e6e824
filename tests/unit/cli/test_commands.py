"""What a user reads before anything runs: help, choices, configurations and wrong names."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from opcd_nemo import cli
from opcd_nemo.cli import main
from opcd_nemo.cli.choices import groups
from opcd_nemo.cli.commands import COMMANDS
from opcd_nemo.cli.composed import value_sources
from opcd_nemo.config.schema import described
from opcd_nemo.config.train import TrainConfig
from opcd_nemo.launch import signals
from opcd_nemo.launch.compose import compose
from tests.tree import ROOT

CPU_SECONDS = 0.5  # 0.2 measured; a loaded machine costs more
_MEASURED = """
import json, resource, sys
from opcd_nemo.cli import main
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in ("torch", "hydra", "megatron", "nemo") if name in sys.modules]
print(json.dumps([code, used.ru_utime + used.ru_stime, heavy]), file=sys.stderr)
"""


@pytest.mark.parametrize("words", ["--help", "train --help", "experience -h", "--version", "list"])
def test_help_is_cheap(words: str) -> None:
    command = [sys.executable, "-c", _MEASURED, *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    code, seconds, heavy = json.loads(done.stderr)
    assert (code, heavy) == (0, [])
    assert done.stdout
    assert seconds < CPU_SECONDS


@pytest.mark.parametrize(
    ("word", "settled"), [("train", True), ("doctor", True), ("experience", True), ("list", False)]
)
def test_what_a_signal_does_is_settled_before_anything_is_imported(
    word: str, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    monkeypatch.setattr(signals, "stop_on_signals", lambda: done.append(word))
    monkeypatch.delattr(cli, "commands")
    monkeypatch.setitem(sys.modules, "opcd_nemo.cli.commands", None)
    with pytest.raises(ImportError):
        main([word])
    assert done == ([word] if settled else [])


def test_what_settles_signals_is_light() -> None:
    loaded = "import sys, opcd_nemo.cli, opcd_nemo.launch.signals; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True
    )
    others = {"yaml", "omegaconf", "hydra", "numpy", "torch", "psutil", "opcd_nemo.config"}
    assert not others & set(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_describes_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: opcd {command} ")
    assert shown.count(f"\n  opcd {command} ") == 2  # examples


def test_help_has_every_key_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-h"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key in described(TrainConfig):
        assert f"{key.key}: {key.words.rstrip('.')}" in shown or f"{key.key} {key.words}" in shown


@pytest.mark.parametrize("command", ["train", "chat", "experience"])
def test_help_has_the_keys_of_every_engine(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for file in (ROOT / "conf/engine").glob("*.yaml"):
        assert f"engine: arguments of engine={file.stem}." in shown
        for name, value in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            if name != "_target_":
                assert f" engine.{name} " in shown
                assert f"[{json.dumps(value)} by default]".replace('"', "") in shown
    assert "None [" not in shown, "a line of a file that says nothing"


@pytest.mark.parametrize("command", ["train", "experience"])
def test_help_names_every_recipe_and_its_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    other = "experience" if command == "train" else "train"
    mine, _, others = shown.partition(f"; for opcd {other}: ")
    for file in (ROOT / "conf/recipe").glob("*.yaml"):
        assert file.stem in mine + others.partition("keys:")[0]
    assert ("demo_games" in others.partition("keys:")[0]) == (command == "train")


@pytest.mark.parametrize("word", ["recipe", "recipes"])
def test_choices_stand_in_a_line_each(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", word]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list((ROOT / "conf/recipe").glob("*.yaml")))
    assert any(line.startswith("demo_games ") and "notes of a game" in line for line in lines)


def test_every_choice_is_a_whole_sentence_of_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for group in groups():
        assert main(["list", group]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 120 or line[-1] not in ".?:"] == []


def test_every_group_has_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    folders = [path for path in (ROOT / "conf").iterdir() if list(path.glob("*.yaml"))]
    assert len(lines) == len(folders)
    assert all(len(line.split()) > 5 for line in lines), lines
    meanings = [line.split(maxsplit=1)[1] for line in lines]
    assert [words for words in meanings if not words[0].isupper()] == []


def test_every_group_is_listed_in_the_plural(capsys: pytest.CaptureFixture[str]) -> None:
    for group in ("tasks", "contexts", "losses", "students", "methods"):
        assert main(["list", group]) == 0
    assert "demo_" not in capsys.readouterr().out


def test_a_configuration_is_printed_with_the_file_of_each_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["recipe=demo_games", "optim.min_lr=1e-5", "parallel=tp2"]
    assert main(["config", *words]) == 0
    shown = capsys.readouterr().out
    printed = yaml.safe_load(shown)
    composed = compose("train", words)
    assert printed["optim"]["lr"] == composed.optim.lr
    assert printed["context"]["template"] == composed.context.template
    assert printed["name"] == composed.name == "demo_games-tp2"
    sources = value_sources("train", words)
    assert sources["optim.lr"] == "conf/recipe/demo_games.yaml"
    assert sources["optim.min_lr"] == "command line"
    assert sources["student.path"] == "conf/student/game_notes.yaml"
    assert sources["parallel.tensor_model_parallel_size"] == "conf/parallel/tp2.yaml"
    assert sources["seed"] == "conf/train.yaml"
    (line,) = [line for line in shown.splitlines() if line.startswith("  lr: ")]
    assert line.endswith("# conf/recipe/demo_games.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "no such command; did you mean train?"),
        (["recipe=demo_json"], "did you mean opcd train recipe=demo_json?"),
        (["train", "--hlp"], "no such option; did you mean --help?"),
        (["list", "tsk"], "no such group; did you mean task?"),
        (["list", "tasks", "recipes"], "a single group"),
        (["config", "--program", "trian"], "did you mean train?"),
        (["registry", "lst"], "no such command; did you mean list?"),
        (["registry", "list"], "registry=null; allowed: a folder of a registry"),
        (["train", "--cfg", "jb"], "--cfg=jb; allowed: job, all, hydra"),
    ],
)
def test_a_wrong_word_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert line.count(",") < 15


def test_a_recipe_of_a_training_is_refused_by_the_pipeline() -> None:
    command = [sys.executable, "-m", "opcd_nemo.cli", "experience", "recipe=demo_json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe=demo_json: is for opcd train; allowed: opcd train")
    assert done.stderr.count("\n") == 1


def test_a_configuration_is_asked_for_by_its_command_s_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "experience", "recipe=demo_games"]) == 0
    by_name = capsys.readouterr().out
    assert main(["config", "--program", "experience", "recipe=demo_games"]) == 0
    assert capsys.readouterr().out == by_name
