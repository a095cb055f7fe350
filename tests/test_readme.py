"""What README and the configurations' headers tell people to type works; files they name exist."""

import re
import shlex
from pathlib import Path

import pytest
from absl import flags

from relay_jax.config import build, parse_stage
from relay_jax.sampling.seeds import parse_seeds
from tests.conftest import command_line

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(
    re.findall(r"```bash\n(.*?)```", README + (ROOT / "docs/running.md").read_text(), re.DOTALL)
)
HEADERS = [
    re.search(r"Command: +((?:.*\\\n)*.*)", p.read_text())
    for p in sorted((ROOT / "configs").glob("*.py"))
]
COMMANDS = sorted(
    {
        part.strip()
        for text in [SHELL, *(m.group(1).replace("\\\n", " ") for m in HEADERS if m)]
        for line in text.splitlines()
        for part in line.split("&&")
        if "relay_jax.main" in part
    }
)


def test_readme_has_the_two_commands_that_do_everything() -> None:
    lines = README.splitlines()
    assert any(
        re.match(
            r"pip install -r requirements.txt && python -m relay_jax.main .*configs/demo.py", s
        )
        for s in lines
    )
    assert "pip install -r requirements-dev.txt && pytest" in lines


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_the_program_takes(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "relay_jax.main"]
    with command_line(*words[3:]):
        stages = build(flags.FLAGS["config"].value)
        parse_stage(stages, flags.FLAGS["stage"].value)
        parse_seeds(flags.FLAGS["seeds"].value)


def test_tests_that_the_docs_name_exist() -> None:
    tests = "\n".join(p.read_text() for p in ROOT.glob("tests/**/*.py"))
    existing = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    existing |= {p.stem for p in ROOT.glob("tests/**/test_*.py")}
    named = set(re.findall(r"\btest_\w+", "\n".join(p.read_text() for p in ROOT.glob("docs/*.md"))))
    assert len(named) > 50
    assert not named - existing


def test_files_that_readme_names_exist() -> None:
    named = set(re.findall(r"`((?:configs|relay_jax|docs|launch|tests)/[\w/.]+\.\w+)`", README))
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / name).exists()]
