"""Where and with what a program runs, for the record beside its results: versions, devices,
command line, commit."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from relay_jax.runtime.sharding import describe

PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
)
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # those that change what is computed, or how fast


def environment(mesh: Mesh) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    return {
        "command": shlex.join(sys.argv),
        "git": revision(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "devices": describe(mesh),
        "host": socket.gethostname(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def revision(root: Path) -> str:
    """The commit of a checkout, with "-dirty" if tracked files differ from it; "" where `root`
    is no checkout.

    Without the git program the commit is read from its files, and changes are not seen.
    """
    if not (root / ".git").exists():  # git itself would go on to look in the folders above
        return ""
    try:
        asked = subprocess.run(
            [
                "git",
                "-C",
                str(root),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return asked.stdout.strip()
    except (
        OSError,
        subprocess.SubprocessError,
    ):  # no git, or a checkout that belongs to someone else
        pass
    try:
        folder = root / ".git"
        if folder.is_file():  # a worktree
            folder = root / folder.read_text().removeprefix("gitdir:").strip()
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        shared = folder / "commondir"
        for place in (
            (folder, folder / shared.read_text().strip()) if shared.exists() else (folder,)
        ):
            if (place / name).exists():
                return (place / name).read_text().strip()
            packed = place / "packed-refs"
            for line in packed.read_text().splitlines() if packed.exists() else []:
                if line.endswith(f" {name}"):
                    return line.split()[0]
    except OSError:
        pass
    return ""
