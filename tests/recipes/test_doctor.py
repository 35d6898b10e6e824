"""The doctor as a user calls it: whole on a tiny run, in one line where it must not go on."""

from __future__ import annotations

from pathlib import Path

from tests.recipes.conftest import run_python
from tests.tree import PYTHONPATH


def test_tiny_run_passes_on_two_ranks(smoke: list[str]) -> None:
    done = run_python("recipes/doctor.py", *smoke, "recipe=demo_brevity", "parallel=tp2")
    assert done.returncode == 0, done.stderr
    *rows, counts = done.stdout.splitlines()
    assert sum(row.startswith("PASS") for row in rows) == 16
    assert counts == "16 pass, 1 warn, 0 fail, 0 skip"  # a random model has no in-context gap
    for name in ("gradient of the head", "gradients over tp", "rollout against trainer"):
        assert any(name in row for row in rows)


def test_failed_check_of_files_starts_no_rank(smoke: list[str], tmp_path: Path) -> None:
    done = run_python("recipes/doctor.py", *smoke, "teacher.path=nowhere")
    assert done.returncode == 1
    assert "FAIL  models" in done.stdout
    assert "-> use a Hugging Face folder" in done.stdout
    assert done.stderr == "error: 1 of 7 checks failed: models\n"


def test_environment_alone_serves_as_a_health_check() -> None:
    done = run_python("recipes/doctor.py", "doctor.environment_only=true", "student.path=nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "6 pass, 0 warn, 0 fail, 0 skip"


def test_a_transformer_engine_that_cannot_be_imported_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    fails = 'raise OSError("libcuda.so.1: cannot open shared object file")'
    (tmp_path / "transformer_engine" / "__init__.py").write_text(fails)
    done = run_python(
        "recipes/doctor.py",
        "doctor.environment_only=true",
        environment={"PYTHONPATH": f"{tmp_path}:{PYTHONPATH}"},
        fresh=True,
    )
    assert done.returncode == 1
    assert "FAIL  imports   megatron-core: OSError('libcuda.so.1" in done.stdout
    assert "-> use a GPU, or an environment without transformer-engine" in done.stdout
    assert "uninstall" not in done.stdout
    assert done.stderr == "error: 1 of 2 checks failed: imports\n"
