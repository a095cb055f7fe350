"""Killed at any moment and started again, a sampling ends with the same bytes, and writes no
finished file again.

The supervisor at the end of this file is a program of its own (tests/supervised.py).
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax import commandline
from tests.supervised import end, start, supervise, wait_until

SEEDS, SHARD, KILLS = "3-302", 25, {"png": 2, "npz": 3}
PATTERNS = {"png": "*/*.png", "npz": "[0-9]*.npz", "arrayrecord": "*/*.array_record"}
CONFIG = """
from relay_jax.configs import demo


def get_config(_=''):
    config = demo.get_config("smoke")
    for stage in (config.stages.base, config.stages.relay):
        stage.model.update(channels=8, head_width=8, multipliers=(1,), attention=())
    config.stages.relay.resolution = 16
    config.stages.relay.process.patch = 2
    return config
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the supervisor did, and the folder of its images: FORMAT-straight, FORMAT-killed."""
    return supervise(__file__, tmp_path_factory.mktemp("interruption"), CONFIG)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_killed_pngs_end_the_same_bit_for_bit(story: dict) -> None:
    killed, straight = (
        files_of(story["folder"] / f"png-{name}") for name in ("killed", "straight")
    )
    assert killed == straight and len(straight) == 301


def test_killed_npz_files_end_the_same_bit_for_bit(story: dict) -> None:
    killed, straight = (
        files_of(story["folder"] / f"npz-{name}") for name in ("killed", "straight")
    )
    assert killed == straight and "samples_300x16x16x3.npz" in straight and len(straight) > 13


@pytest.mark.parametrize("kind", KILLS)
def test_it_was_killed_in_the_middle_and_wrote_nothing_twice(story: dict, kind: str) -> None:
    counts = story["there"][kind]  # finished files after each kill
    assert len(counts) == KILLS[kind] and counts == sorted(set(counts)) and counts[0] > 0
    assert counts[-1] < story["files"][kind], "move the moments"
    assert story["rewritten"] == []


def test_all_formats_hold_the_same_images_in_the_order_of_their_seeds(story: dict) -> None:
    from relay_jax.data.packed import PackedDataset

    folder = story["folder"]
    files = sorted((folder / "png-straight").rglob("*.png"))
    assert [int(file.stem) for file in files] == list(range(3, 303))
    pixels, classes = (
        np.stack([np.asarray(Image.open(file)) for file in files]),
        np.arange(3, 303) % 8,
    )
    with np.load(folder / "npz-straight" / "samples_300x16x16x3.npz") as merged:
        assert list(merged) == ["arr_0", "arr_1"] and merged["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(merged["arr_0"], pixels)
        np.testing.assert_array_equal(merged["arr_1"], classes)
    packed = PackedDataset(folder / "arrayrecord-straight", 16)
    packed.verify()
    np.testing.assert_array_equal(np.stack([packed[i][0] for i in range(len(packed))]), pixels)
    assert [
        packed[i][1] for i in range(len(packed))
    ] == classes.tolist() and packed.num_classes == 8
    assert len(np.unique(pixels.reshape(300, -1), axis=0)) == 300 and pixels.std() > 10


def test_sigterm_keeps_the_images_of_unfinished_files_and_asks_for_a_new_start(story: dict) -> None:
    assert story["status"] == 75
    assert (
        0 < story["images_there"][0] < story["images_there"][1] < 300
        and story["images_there"][1] % SHARD != SHARD - 3
    )
    assert "stopped by SIGTERM; " in (story["folder"] / "npz-killed.log").read_text()


# The supervisor.


def sample(folder: Path, name: str) -> int:
    weights = [f"--weights.{stage}={folder / 'run' / stage}" for stage in ("base", "relay")]
    kind = name.partition("-")[0]
    return start(
        folder,
        name,
        "--mode=sample",
        *weights,
        f"--seeds={SEEDS}",
        f"--out={folder / name}",
        f"--format={kind}",
    )


def finished(out: Path) -> dict[str, int]:
    """When each finished file of images was written."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in out.glob(PATTERNS[out.name.partition("-")[0]])
    }


def wait_for_more(pid: int, out: Path, before: int) -> None:
    status = wait_until(pid, lambda: len(finished(out)) > before, 100)
    assert status is None, "ended by itself: more seeds are needed for so many kills"


def kill_often(folder: Path, kind: str, rng: random.Random) -> tuple[list[int], list[str]]:
    """Finished files after each kill, and those that a later start has written again."""
    out, counts, rewritten = folder / f"{kind}-killed", [], []
    for _ in range(KILLS[kind]):
        before = finished(out)
        pid = sample(folder, out.name)
        wait_for_more(pid, out, len(before))
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert end(pid) == -signal.SIGKILL
        rewritten += [path for path, when in before.items() if finished(out).get(path) != when]
        counts.append(len(finished(out)))
    return counts, rewritten


def ask_to_stop(folder: Path) -> dict:
    """SIGTERM to one more start of the killed npz sampling; images in finished files before and
    after."""
    out = folder / "npz-killed"

    def there() -> int:
        """Of finished files, and of those that were kept for the next start."""
        kept = [str(path) for path in out.glob(".*.part")]
        return sum(
            int(last) - int(first) + 1
            for first, last in (
                Path(path).stem.strip(".").split("-") for path in [*finished(out), *kept]
            )
        )

    before = there()
    pid = sample(folder, out.name)
    wait_for_more(pid, out, len(finished(out)))
    os.kill(pid, signal.SIGTERM)
    return {"status": end(pid), "images_there": [before, there()]}


def finish(folder: Path, kind: str) -> list[str]:
    """The last start, which ends by itself; files that it has written again."""
    out = folder / f"{kind}-killed"
    before = finished(out)
    assert end(sample(folder, out.name)) == 0
    return [path for path, when in before.items() if finished(out).get(path) != when]


def write_weights(folder: Path) -> int:
    """A checkpoint of each stage, with weights by chance, made in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    try:
        sys.argv = ["main", f"--config={folder / 'config.py'}"]
        commandline.parse_flags(sys.argv)
        from absl import flags

        from relay_jax.config import build
        from relay_jax.runtime.checkpoint import Checkpoints
        from tests.sampling.test_chain import random_params

        for stage in build(flags.FLAGS["config"].value):
            with Checkpoints(folder / "run" / stage.name / "checkpoints") as checkpoints:
                checkpoints.save(
                    1, random_params(stage), {"step": np.int32(1)}, {"step": 1, "images": 16}
                )
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    from relay_jax.sampling import shards

    shards.shard_size = lambda _: SHARD
    where = Path(sys.argv[1])
    began = time.monotonic()
    assert end(write_weights(where)) == 0
    for each in PATTERNS:
        assert end(sample(where, f"{each}-straight")) == 0
    there, again = {}, []
    for each in KILLS:
        there[each], twice = kill_often(where, each, random.Random(each))
        asked = ask_to_stop(where) if each == "npz" else {}
        again += twice + finish(where, each)
    files = {kind: len(finished(where / f"{kind}-straight")) for kind in KILLS}
    print(
        json.dumps(
            {
                **asked,
                "there": there,
                "rewritten": again,
                "files": files,
                "seconds": round(time.monotonic() - began, 1),
            }
        )
    )
