"""A batch that cannot be sampled is refused before anything is trained."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from relay_jax.config import build, settings_of
from relay_jax.errors import UserError
from relay_jax.sampling import memory
from relay_jax.sampling.chain import Chain
from tests.conftest import command_line, mesh_of, run_main


def test_a_small_batch_is_let_through_without_compiling(config: ConfigDict) -> None:
    stages, mesh = build(config), mesh_of(1)
    assert all(memory.surely_fits(s, settings_of(config).sample.batch, mesh) for s in stages)


def test_what_is_let_through_fits(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, mesh = build(config)[1], mesh_of(1)
    analysis = Chain([stage], {}, mesh, 16)._compiled(stage).memory_analysis()
    monkeypatch.setattr(memory, "memory_of_machine", lambda: analysis.temp_size_in_bytes)
    assert not memory.surely_fits(stage, 16, mesh)


def test_a_batch_that_does_not_fit_is_refused_with_one_that_may(
    config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, mesh = build(config)[1], mesh_of(1)
    chain = Chain([stage], {}, mesh, 16)
    analysis = chain._compiled(stage).memory_analysis()
    fixed = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    needed = fixed + analysis.temp_size_in_bytes
    monkeypatch.setattr(memory, "memory_of_machine", lambda: needed)
    chain.check_memory()
    monkeypatch.setattr(memory, "memory_of_machine", lambda: needed - 1)
    with pytest.raises(UserError, match=r"sample\.batch 16 does not fit: stage relay") as error:
        chain.check_memory()
    assert "use --config.sample.batch=8 (" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_training_is_refused_before_it_begins(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(
        "from tests.conftest import tiny_relay\n\n\ndef get_config(_=''):\n"
        "    return tiny_relay()\n"
    )
    arguments = (
        f"--config={file}",
        f"--workdir={tmp_path / 'run'}",
        "--config.sample.batch=4194304",
    )
    with (
        command_line(*arguments),
        pytest.raises(UserError, match=r"sample\.batch 4194304 does not fit"),
    ):
        run_main()
    assert not list(tmp_path.rglob("checkpoints"))
