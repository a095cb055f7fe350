"""The record of an environment: versions, command, commit with and without the git program."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from relay_jax.runtime import environment as module
from relay_jax.runtime.environment import environment, revision
from tests.conftest import mesh_of

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def test_the_record_is_plain_and_says_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", "--workdir=my runs/x"])
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--some")
    record = json.loads(json.dumps(environment(mesh_of(1))))
    assert record["command"] == "main.py '--workdir=my runs/x'"
    assert record["packages"]["jax"] == jax.__version__ and "" not in record["packages"].values()
    assert record["devices"] == "1 host, 1 x cpu, mesh data 1 x fsdp 1"
    assert record["variables"] == {"LIBTPU_INIT_ARGS": "--some"}


@pytest.fixture
def without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(module.subprocess, "run", run)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    "files",
    [
        {".git/HEAD": f"{COMMIT}\n"},
        {
            ".git/HEAD": "ref: refs/heads/main\n",
            ".git/refs/heads/main": f"{COMMIT}\n",
            ".git/packed-refs": f"{OTHER} refs/heads/main\n",
        },
        {
            ".git/HEAD": "ref: refs/heads/main\n",
            ".git/packed-refs": f"# packed\n{OTHER} refs/heads/my-refs/heads/main\n"
            f"{COMMIT} refs/heads/main\n",
        },
        {
            ".git": "gitdir: store/worktrees/x\n",
            "store/worktrees/x/HEAD": "ref: refs/heads/side\n",
            "store/worktrees/x/commondir": "../..\n",
            "store/refs/heads/side": f"{COMMIT}\n",
        },
    ],
    ids=["detached", "branch", "packed", "worktree"],
)
def test_the_commit_is_read_without_git(
    without_git: None, tmp_path: Path, files: dict[str, str]
) -> None:
    write(tmp_path, files)
    assert revision(tmp_path) == COMMIT


def test_no_checkout_has_no_commit(without_git: None, tmp_path: Path) -> None:
    assert revision(tmp_path) == ""
    write(tmp_path, {".git/HEAD": "ref: refs/heads/main\n"})
    assert revision(tmp_path) == ""


def test_git_says_whether_files_have_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *settings, *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("needs git")
    write(tmp_path, {"a.txt": "1"})
    git("add", "a.txt")
    git("commit", "-qm", "one")
    git("tag", "v1", "-m", "a tag must not stand for the commit")
    commit = git("rev-parse", "HEAD")
    assert revision(tmp_path) == commit
    write(tmp_path, {"a.txt": "2"})
    assert revision(tmp_path) == commit + "-dirty"
