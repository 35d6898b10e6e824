"""What the built image is: the vendor's packages untouched, the project working, nobody root."""

from __future__ import annotations

import json
from importlib.metadata import version

from tests.image.conftest import VENDORS, Image
from tests.recipes.conftest import SMOKE

DIST_PACKAGES = "/usr/local/lib/python3.11/dist-packages"


def test_the_vendors_packages_are_the_ones_in_use(image: Image) -> None:
    checked = image.run("python", "docker/vendor.py", "check", "vendor.json")
    assert checked.stdout == "the vendor's packages are as they were\n", checked
    recorded = json.loads(image.run("cat", "vendor.json").stdout)
    expected = {**VENDORS, "torch": version("torch"), "megatron_core": version("megatron-core")}
    for name, number in expected.items():
        assert recorded[name.replace("_", "-")] == [number, DIST_PACKAGES]
    used = image.run("python", "-c", "import torch; print(torch.__file__)").stdout
    assert used == f"{DIST_PACKAGES}/torch/__init__.py\n"


def test_pip_refuses_to_replace_them_later(image: Image) -> None:
    refused = image.run("python", "-m", "pip", "install", "--dry-run", "torch==2.9.0")
    assert refused.returncode != 0
    assert "torch==2.13" in refused.stdout + refused.stderr


def test_the_user_is_not_root_and_the_image_says_what_it_is(image: Image) -> None:
    assert image.run("id", "-u").stdout == "10001\n"
    config = image.inspect()
    assert config["User"] == "10001"
    assert config["Labels"]["org.opencontainers.image.revision"] == "test"  # type: ignore[index]
    assert "opcd" in config["Healthcheck"]["Test"]  # type: ignore[index]


def test_the_health_check_is_content(image: Image) -> None:
    kind, *command = image.inspect()["Healthcheck"]["Test"]  # type: ignore[index]
    assert kind == "CMD"
    checked = image.run(*command)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_doctor_and_the_smoke_recipe_run(image: Image) -> None:
    settings = [*SMOKE, "student.path=/model", "parallel=single", "name=smoke"]
    settings += ["exp_manager.exp_dir=/workspace/runs"]
    for command in ("doctor", "train"):
        done = image.run("opcd", command, *settings, volumes=[f"{image.model}:/model:ro"])
        assert done.returncode == 0, done.stdout + done.stderr
    assert image.run("test", "-s", "/workspace/runs/smoke/DONE").returncode == 0
