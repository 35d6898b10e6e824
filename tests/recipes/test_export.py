"""A distilled student goes to every format and back, is restored by NeMo's API, and chats."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from opcd_nemo.formats.locate import NEMO_CONFIG
from opcd_nemo.formats.nemo import EVALUATION, open_package, read_record
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.storage import durable
from opcd_nemo.storage.archive import read_whole, write_tar
from tests.recipes.conftest import Train, run_python


@pytest.fixture(scope="module")
def run(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run at TP 2 with a `.nemo` at its end."""
    folder = tmp_path_factory.mktemp("exported")
    done = train(
        "parallel=tp2", "name=run", "optim.lr=1e-2", f"exp_manager.exp_dir={folder}",
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"written: {folder / 'run' / 'run.nemo'}" in done.stdout
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """checkpoint -> hf, and run.nemo -> mcore -> hf."""
    folder = run / "exports"
    steps = (
        ("hf", run / "checkpoints" / "step=2.ckpt", folder / "hf"),
        ("mcore", run / "run.nemo", folder / "mcore"),
        ("hf", folder / "mcore", folder / "hf-again"),
    )
    for kind, source, target in steps:
        done = run_python("recipes/export.py", f"format={kind}", f"from={source}", f"to={target}")
        assert done.returncode == 0, done.stderr
        assert f"written: {target}" in done.stdout
    return folder


def test_every_way_gives_the_same_bits(run: Path, exported: Path, tiny: Path) -> None:
    first, again, base = (
        load_file(folder / "model.safetensors")
        for folder in (exported / "hf", exported / "hf-again", tiny)
    )
    assert first.keys() == again.keys() == base.keys()
    assert all(first[name].equal(again[name]) for name in first)
    assert not all(first[name].equal(base[name]) for name in first)  # it has learnt
    card = (exported / "hf" / "README.md").read_text()
    assert f"answers as its base model, `{tiny}`, answers after" in card
    assert "## Scores" in card
    assert "## The context" in card
    for name in ("tokenizer.json", "tokenizer_config.json", "context.json", EVALUATION):
        assert (exported / "hf" / name).read_bytes() == (exported / "hf-again" / name).read_bytes()
    summary = json.loads((run / "summary.json").read_text())
    assert read_record(open_package(run / "run.nemo"), EVALUATION) == summary
    context = json.loads((exported / "hf" / "context.json").read_text())
    assert context["content_hash"] == summary["context_hash"]


def test_transformers_answers_as_the_engine(run: Path) -> None:
    source = run / "checkpoints" / "step=2.ckpt"
    done = run_python("-m", "tests.compare_export", str(source), "--prompts", "4", "--tokens", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 answers equal" in done.stdout


RESTORE = """
import multiprocessing, os, sys

def main():
    from opcd_nemo.trainer.model import OPCDModel
    config = OPCDModel.restore_from(sys.argv[1], return_config=True)
    config.parallel.tensor_model_parallel_size = 1
    model = OPCDModel.restore_from(sys.argv[1], override_config_path=config)
    model.scores("student", with_context=False)
    model.save_to(sys.argv[2])
    print("teacher", model.cfg.teacher.path, "done")
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    os._exit(0)

if __name__ == "__main__":
    main()
"""


def test_nemo_restores_it_on_another_layout_and_saves_it_again(
    run: Path, tiny: Path, tmp_path: Path
) -> None:
    program = tmp_path / "restore.py"
    program.write_text(RESTORE)
    done = run_python(str(program), str(run / "run.nemo"), str(tmp_path / "again.nemo"))
    assert f"teacher {tiny} done" in done.stdout, done.stderr
    first, again = (open_model(str(p)) for p in (run / "run.nemo", tmp_path / "again.nemo"))
    assert first.config == again.config
    assert all(first.tensor(name).equal(again.tensor(name)) for name in first.names())


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("task._target_", "os.system", "of opcd_nemo"),
        ("trainer.callbacks", [{"_target_": "subprocess.call"}], "of opcd_nemo"),
        ("target", "subprocess.Popen", "OPCDModel"),
        ("name", "${oc.env:HOME}", "interpolation"),
    ],
)
def test_an_injected_target_is_refused(
    key: str, value: object, word: str, exported: Path, tmp_path: Path
) -> None:
    from opcd_nemo.trainer.model import OPCDModel

    folder = tmp_path / "hostile"
    shutil.copytree(exported / "mcore", folder)
    config = OmegaConf.load(folder / NEMO_CONFIG)
    OmegaConf.update(config, key, value, force_add=True)
    OmegaConf.save(config, folder / NEMO_CONFIG)
    names = durable.files_in(folder)
    durable.write_manifest(folder, {name: durable.measure(folder / name) for name in names})
    write_tar(tmp_path / "hostile.nemo", folder, [*names, durable.MANIFEST])
    with pytest.raises(ValueError, match=word):
        OPCDModel.restore_from(str(tmp_path / "hostile.nemo"))


def test_a_flipped_bit_anywhere_is_noticed(run: Path, tmp_path: Path) -> None:
    whole, damaged = (run / "run.nemo").read_bytes(), tmp_path / "damaged.nemo"
    with tarfile.open(run / "run.nemo") as tar:
        members = [(one.name, one.offset_data, one.size) for one in tar]
    for name, start, size in members:
        data = bytearray(whole)
        data[start + size // 2] ^= 1
        damaged.write_bytes(data)
        with pytest.raises(ValueError, match="." if name == durable.MANIFEST else re.escape(name)):
            _read_everything(damaged)


def _read_everything(path: Path) -> None:
    checkpoint = open_model(str(path))
    for name in checkpoint.names():
        checkpoint.tensor(name)
    files = open_package(path)
    for name in files.sizes():
        read_whole(files, name)


def test_chat_answers_with_and_without_the_context(run: Path) -> None:
    done = run_python(
        "recipes/chat.py",
        f"from={run / 'run.nemo'}",
        "sampling.max_new_tokens=4",
        stdin="What is a goat?\n/context\n/nothing\n/reset\nAnd a lamp?\n/quit\nnever read\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[without context]") == done.stdout.count("[with context]") == 2
    assert "A violin is a string instrument" in done.stdout
    assert "/nothing: no such command" in done.stdout


MISTAKES = {
    "format=onnx from=a to=b": "format=onnx; allowed: hf, nemo, mcore",
    "from=/nowhere to=b": "/nowhere: the model is not there",
    "to=b": "from: no value is given: the model to convert; allowed: a Hugging Face",
    "from=smollm2-135m-instruct to=recipes": "already there",
    "from=a to=b format=nemo": "ends in .nemo",
    "from=a to=b fromat=hf": "fromat=hf: no such key",
    "from=a to=b dtype=int8": "dtype=int8; allowed: null, bf16, fp32",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_bad_input_is_one_line(line: str) -> None:
    done = run_python("recipes/export.py", *line.split())
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert MISTAKES[line] in done.stderr
