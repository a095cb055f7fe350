"""Where and with what a program runs: versions, devices, command line, commit.

The record stands beside what the program has made, so that its
numbers can be made again.
"""

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
# Those that change what is computed, or how fast.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def environment(mesh: Mesh) -> dict[str, Any]:
    """What runs on the devices of a mesh, as plain values, ready for JSON."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "command": shlex.join(sys.argv),
        "git": revision(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "packages": {name: text for name, text in versions.items() if text},
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
    """The commit of a checkout, with "-dirty" if tracked files differ; "" where there is none.

    Without the git program the commit is read from its files, and
    changes are not seen.
    """
    # git itself would go on to look in the folders above, which
    # may be a checkout of another project that holds this
    # package as a dependency.
    if not (root / ".git").exists():
        return ""
    # A tag must not stand for the commit: tags move, and a commit
    # can be looked up without them.
    options = ("--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        description = subprocess.run(
            ["git", "-C", str(root), "describe", *options],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return description.stdout.strip()
    # No git, or a checkout that belongs to someone else.
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return _commit_in_files(root)
    except OSError:
        return ""


def _commit_in_files(root: Path) -> str:
    """What .git/HEAD stands for; "" where it stands for nothing. Raises OSError."""
    folder = root / ".git"
    if folder.is_file():  # a worktree: the file names its folder
        folder = root / folder.read_text().removeprefix("gitdir:").strip()
    head = (folder / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    shared = folder / "commondir"
    # A worktree keeps its branches in
    # the checkout that it belongs to.
    for place in (folder, folder / shared.read_text().strip()) if shared.exists() else (folder,):
        if (place / name).exists():
            return (place / name).read_text().strip()
        packed = place / "packed-refs"
        for line in packed.read_text().splitlines() if packed.exists() else []:
            if line.endswith(f" {name}"):
                return line.split()[0]
    return ""
