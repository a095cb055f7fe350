"""Killed at any moment and started again, a run ends bit-identical; SIGTERM saves and stops.

The supervisor at the end of this file is a program of its own (tests/supervised.py).
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.supervised import end, start, supervise, wait_until

STEPS, EVERY, BATCH, KILLS = 800, 2, 4, 21
RARE = f"--config.checkpoint.every_images={STEPS * BATCH}"  # only at the end
CONFIG = f"""
from relay_jax.configs import demo


def get_config(_=''):
    config = demo.get_config("smoke")
    config.stages.base.model.update(channels=8, head_width=8, multipliers=(1,), attention=())
    config.stages.base.train.update(images={STEPS * BATCH}, batch={BATCH})
    config.dataset.update(size=64, threads=1)
    config.checkpoint.every_images = {EVERY * BATCH}
    config.log.update(every_steps=1, grid_every_images=0)
    return config
"""


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the supervisor did, and the folder of its runs: straight, killed, asked."""
    return supervise(__file__, tmp_path_factory.mktemp("resume"), CONFIG)


@pytest.mark.parametrize("run", ["killed", "asked"])
def test_an_interrupted_run_ends_bit_identical(record: dict, run: str) -> None:
    import chex

    from relay_jax.runtime.files import read_jsonl
    from tests.training.test_loop import final_state

    ended, straight = (final_state(record["folder"] / name / "base") for name in (run, "straight"))
    assert ended["step"] == STEPS
    chex.assert_trees_all_equal(ended, straight)
    lines = [
        read_jsonl(record["folder"] / name / "base" / "metrics.jsonl") for name in (run, "straight")
    ]
    curves = [[(line["images"], line["loss"]) for line in run_lines] for run_lines in lines]
    assert curves[0] == curves[1] and len(curves[0]) == STEPS, "the curve has gaps or repeats"


def test_the_run_was_killed_often_and_in_the_middle_of_saves(record: dict) -> None:
    assert record["kills"] == KILLS >= 20
    assert record["during_save"] >= 4, "move the moments"
    assert len(set(record["steps"])) >= 5, "always killed at the same place"


def test_sigterm_saves_at_the_end_of_a_step_and_asks_for_a_new_start(record: dict) -> None:
    assert record["status"] == 75
    assert record["saved"] and record["saved"][0] > 2
    assert (
        f"saved at {record['saved'][0] * BATCH} images"
        in (record["folder"] / "asked.log").read_text()
    )


# The supervisor.


def train(folder: Path, name: str, *arguments: str) -> int:
    return start(folder, name, f"--workdir={folder / name}", "--stage=base", *arguments)


def complete(checkpoints: Path) -> list[int]:
    return sorted(int(p.name) for p in checkpoints.glob("*") if p.name.isdecimal())


def kill_often(folder: Path, rng: random.Random) -> dict:
    checkpoints, during_save, steps = folder / "killed" / "base" / "checkpoints", 0, []
    for kill in range(KILLS):
        pid, before = train(folder, "killed"), max(complete(checkpoints), default=0)
        left_over = set(checkpoints.glob("*tmp*"))  # of the kill before

        def moment(
            begun: Callable[[], bool], low: float, high: float, before: int = before
        ) -> Callable[[], bool]:
            """Some seconds after something has begun; sooner on a machine so fast that the run
            would come to its end."""
            until: list[float] = []

            def reached() -> bool:
                if not until and begun():
                    until.append(time.monotonic() + rng.uniform(low, high))
                soon = max(complete(checkpoints), default=0) >= before + 4 * EVERY
                return soon or (bool(until) and time.monotonic() > until[0])

            return reached

        if kill % 3 == 0:  # whenever, mostly while it starts
            status = wait_until(pid, moment(lambda: True, 0.1, 3))
        elif kill % 3 == 1:  # as soon as a save has begun, and somewhat later
            saving = partial(is_saving, checkpoints, left_over)
            status = wait_until(pid, moment(saving, 0, rng.choice([0, 0.02, 0.1])))
        else:  # after a save
            status = wait_until(pid, moment(partial(is_newer, checkpoints, before), 0, 0.2))
        assert status is None, "ended by itself: more steps are needed for so many kills"
        os.kill(pid, signal.SIGKILL)
        end(pid)
        during_save += is_saving(checkpoints, left_over)
        steps.append(max(complete(checkpoints), default=0))
    assert end(train(folder, "killed", RARE)) == 0
    return {"kills": KILLS, "during_save": during_save, "steps": steps}


def is_saving(checkpoints: Path, left_over: set[Path]) -> bool:
    return bool(set(checkpoints.glob("*tmp*")) - left_over)


def is_newer(checkpoints: Path, before: int) -> bool:
    return max(complete(checkpoints), default=0) > before


def ask_to_stop(folder: Path) -> dict:
    metrics = folder / "asked" / "base" / "metrics.jsonl"
    pid = train(folder, "asked", RARE)
    wait_until(pid, lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    os.kill(pid, signal.SIGTERM)
    record = {"status": end(pid), "saved": complete(folder / "asked" / "base" / "checkpoints")}
    assert end(train(folder, "asked", RARE)) == 0
    return record


if __name__ == "__main__":
    where = Path(sys.argv[1])
    began = time.monotonic()
    assert end(train(where, "straight", RARE)) == 0
    report = {**ask_to_stop(where), **kill_often(where, random.Random(0))}
    print(json.dumps({**report, "seconds": round(time.monotonic() - began, 1)}))
