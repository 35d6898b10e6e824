"""What a package says of the run that made it."""

from __future__ import annotations

from opcd_nemo.config.stored import check_stored
from opcd_nemo.export.convert import nemo_config


def test_a_package_names_no_server_and_no_program() -> None:
    engine = {"_target_": "opcd_nemo.engines.vllm.VllmEngine", "python": "/bin/rm", "urls": []}
    stored = nemo_config({"seed": 1, "engine": engine})
    assert stored["engine"]["_target_"] == "opcd_nemo.engines.megatron.MegatronEngine"
    assert "python" not in stored["engine"]
    check_stored(stored, "a.nemo")
