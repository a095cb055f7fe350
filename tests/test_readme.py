"""What README and docs tell people to type works; files, tests and pictures they name exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from absl import flags

import relay_jax
from relay_jax.config import build, load_config, parse_stage, settings_of
from relay_jax.official import convert
from relay_jax.relay import Relay
from relay_jax.sampling.seeds import parse_seeds
from relay_jax.weights import pack
from relay_jax.workdir import claim_workdir
from tests.conftest import command_line

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = (
    "python -m relay_jax.main ",
    "relay-jax ",
    "python -m relay_jax.official.convert ",
    "python -m relay_jax.weights.pack ",
)
# Commands of earlier versions, which people have in their scripts.
EARLIER = """
python -m relay_jax.main --config=configs/demo.py --workdir=runs/demo --mode=sample --seeds=0-63 --out=high --stage=relay --low_res=low
python -m relay_jax.main --config=configs/demo.py --workdir=runs/demo --mode=evaluate --seeds=0-1023 --out=reports/demo
python -m relay_jax.main --config=configs/demo.py --mode=evaluate --images=images --reference=data/mine --out=reports/images
python -m relay_jax.main --config=configs/demo.py --workdir=runs/demo --mode=plot
python -m relay_jax.main --config=configs/imagenet256.py:smoke --workdir=runs/smoke
python -m relay_jax.main --config=configs/imagenet256.py --mode=plan --hardware=v5e,H100
python -m relay_jax.official.convert --to-official runs/mine/relay --out=relay.safetensors --config=configs/imagenet256.py --stage=relay
"""  # noqa: E501


def blocks(kind: str) -> list[str]:
    """The blocks of code of all pages."""
    text = "\n".join(page.read_text() for page in PAGES)
    return re.findall(rf"^ *```{kind}\n(.*?)```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command of ours in README, docs and the headers of the configurations."""
    headers = [
        match[1].replace("\\\n", " ")
        for file in sorted((ROOT / "configs").glob("*.py"))
        if (match := re.search(r"Command: +((?:.*\\\n)*.*)", file.read_text()))
    ]
    lines = "\n".join([*blocks("bash"), *headers, EARLIER]).splitlines()
    parts = {part.strip() for line in lines for part in line.split("&&")}
    return sorted(part for part in parts if part.startswith(PROGRAMS))


def test_readme_has_the_two_commands_that_do_everything() -> None:
    lines = README.splitlines()
    assert (
        "pip install -r requirements.txt && "
        "python -m relay_jax.main --config=configs/demo.py --workdir=runs/demo"
    ) in lines
    assert "pip install -r requirements-dev.txt && pytest" in lines


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_the_program_takes(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # In a folder with the configurations and, where a command opens a run, a run of the demo.
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    program = next(program for program in PROGRAMS if command.startswith(program))
    arguments = shlex.split(command.removeprefix(program), comments=True)
    if program.endswith("convert "):
        assert convert.parse(["convert", *arguments]).reverse == ("--to-official" in arguments)
        return
    if program.endswith("pack "):
        name = "cifar10" if "cifar10" in arguments[0] else "demo"
        claim_workdir(settings_of(load_config(name)).plain, Path(arguments[0]), create=True)
        about = next((a for a in arguments if a.startswith("--about=")), None)
        arguments = [a.replace("relay_jax/", f"{ROOT}/relay_jax/") for a in arguments]
        assert (pack.parse(["pack", *arguments]).about is None) == (about is None)
        return
    workdir = re.search(r"--workdir=(\S+)", command)
    if "--weights=" in command:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    elif "--config=" not in command:
        assert workdir, "neither a configuration nor a run"
        claim_workdir(settings_of(load_config("demo")).plain, Path(workdir[1]), create=True)
    with command_line(*arguments):
        stages = build(flags.FLAGS["config"].value)
        parse_stage(stages, flags.FLAGS["stage"].value)
        parse_seeds(flags.FLAGS["seeds"].value or "0")


def test_python_of_the_pages_uses_names_that_exist() -> None:
    used = set()
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used.add((node.value.id, node.attr))
    objects = {"rx": relay_jax, "relay": Relay}
    named = [(name, attribute) for name, attribute in used if name in objects]
    assert len(named) > 5
    assert not [pair for pair in named if not hasattr(objects[pair[0]], pair[1])]


def test_tests_that_the_docs_name_exist() -> None:
    tests = "\n".join(p.read_text() for p in ROOT.glob("tests/**/*.py"))
    existing = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    existing |= {p.stem for p in ROOT.glob("tests/**/test_*.py")}
    named = set(re.findall(r"\btest_\w+", "\n".join(page.read_text() for page in PAGES)))
    assert len(named) > 50
    assert not named - existing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_pictures_and_files_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in link]
    files = re.findall(
        r"`((?:configs|relay_jax|docs|launch|tests|examples)/[\w/.]+\.\w+)[`:]", text
    )
    missing = [link for link in links if link and not (page.parent / link).exists()]
    missing += [file for file in files if not (ROOT / file).exists()]
    assert not missing
    if page.name == "README.md":
        assert len(links) > 5 and len(files) > 10
