"""Every verb with the inputs of other people (tests/faults.py): it does what is right, or says in
one short line, with status 2, what is wrong. What each kind gives is tested beside its code."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay_jax import commandline, main
from relay_jax.official import convert
from relay_jax.training import train as training
from tests.conftest import command_line
from tests.faults import make_inputs

# Data that can be trained on; with all others that is refused, for
# silently wrong data are the worst.
GOOD = {
    "plain": 0,
    "classes": 2,
    "grey16": 0,
    "turned": 0,
    "transparent": 0,
    "edm_folder": 2,
    "edm_zip": 2,
    "json_below": 2,
    "numbers": 12,
    "numbers_zip": 12,
    "splits": 2,  # with a warning
    "hidden": 0,
    "endings": 0,
    "adm": 2,
    "results": 0,  # the pictures: of an npz beside them source=folder knows nothing
    "pipe": 0,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def spoiled(tiny_run: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of a finished run, to be spoiled."""
    yield shutil.copytree(tiny_run, tmp_path / "spoiled", ignore=shutil.ignore_patterns("cache"))


class Faults:
    """Runs commands in this process, and collects what is wrong with how they ended."""

    def __init__(self, capfd: pytest.CaptureFixture[str], config: Path) -> None:
        self._capfd, self._config, self.found = capfd, config, list[str]()

    def run(self, *arguments: str, may: tuple[int, ...] = (0, 2), config: bool = True) -> int:
        """The exit status of a command; one of `may`, else a fault."""
        named = (f"--config={self._config}",) if config else ()
        self._capfd.readouterr()
        status: Any = 0
        try:
            with command_line(*named, *arguments):
                main.main([])
        except SystemExit as ended:
            status = ended.code
        # What it should never raise, but for tests that look on.
        except Exception as error:
            status = f"{type(error).__name__}: {str(error)[:200]}"
        return self._judge(arguments, status, may)

    def convert(self, *arguments: str) -> int:
        """As `run`, of the command that converts weights; it never succeeds here."""
        self._capfd.readouterr()
        status: Any = 0
        try:
            convert.main(["convert", *arguments])
        except SystemExit as ended:
            status = ended.code
        except Exception as error:
            status = f"{type(error).__name__}: {str(error)[:200]}"
        return self._judge(arguments, status, (2,))

    def _judge(self, arguments: tuple[str, ...], status: Any, may: tuple[int, ...]) -> int:
        error = self._capfd.readouterr().err
        lines = error.strip().splitlines() or [""]
        wrong = ""
        if status not in may:
            wrong = f"status {status}, not {may}"
        elif "Traceback" in error:
            wrong = "a traceback"
        elif len(lines[-1]) >= 400:
            wrong = f"{len(lines[-1])} characters"
        elif status and not lines[-1].startswith("error: "):
            wrong = "no line of error at the end"
        elif sum(line.startswith("error: ") for line in lines) > 1:
            wrong = "several lines of error"
        if wrong:
            self.found.append(f"{' '.join(arguments)[-200:]}: {wrong}: {lines[-1][:300]}")
        return status


@pytest.fixture
def faults(capfd: pytest.CaptureFixture[str], tiny_run: Path) -> Iterator[Faults]:
    """Commands of the tiny relay; the test fails for all that is wrong with them together."""
    collected = Faults(capfd, tiny_run.parent / "config.py")
    yield collected
    assert not collected.found, "\n".join(collected.found)


def data_flags(path: Path, num_classes: int) -> list[str]:
    source = {".zip": "zip", ".npz": "npz"}.get(path.suffix, "folder")
    return [
        f"--config.dataset.source={source}",
        f"--config.dataset.path={path}",
        f"--config.dataset.num_classes={num_classes}",
    ]


def test_preparing_takes_what_is_right_and_refuses_the_rest(
    faults: Faults, inputs: dict[str, Path], tmp_path: Path
) -> None:
    for name, path in inputs.items():
        out = tmp_path / name
        may = (0,) if name in GOOD else (2,)
        faults.run("--mode=prepare", f"--out={out}", *data_flags(path, GOOD.get(name, 0)), may=may)
    assert not Path("it_ran").exists()


def test_training_takes_what_is_right_and_refuses_the_rest(
    faults: Faults, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = []
    monkeypatch.setattr(training, "train_stage", lambda stage, *_: began.append(stage.name))
    for name, path in inputs.items():
        before = len(began)
        late = name == "truncated"  # its header is whole
        flags = data_flags(path, GOOD.get(name, 0))
        may = (0,) if name in GOOD or late else (2,)
        faults.run(f"--workdir={tmp_path / name}", "--stage=base", *flags, may=may)
        assert len(began) - before == (name in GOOD or late)


def test_pictures_of_data_are_drawn_or_refused(
    faults: Faults, inputs: dict[str, Path], tmp_path: Path
) -> None:
    for name, path in inputs.items():
        if name in GOOD and name != "transparent":
            continue  # drawing takes time; the readers are those of the tests above
        flags = data_flags(path, GOOD.get(name, 0))
        may = (0,) if name in GOOD else (2,)
        faults.run("--mode=plot", "--plot=data", f"--out={tmp_path / name}", *flags, may=may)


def test_images_and_references_are_scored_or_refused(
    faults: Faults, inputs: dict[str, Path], tmp_path: Path
) -> None:
    plain, scored = inputs["plain"], "--features=tests.test_faults:features"
    # Which of several things in a folder is meant is asked.
    refused = ("results", "parts_and_sum", "float32", "truncated", "postscript", "evil", "pipe_npz")
    for name, path in inputs.items():
        if name in GOOD and name not in (*refused, "grey16", "edm_zip", "pipe"):
            continue
        for role, flags in (
            ("images", [f"--images={path}", f"--reference={plain}"]),
            ("reference", [f"--images={plain}", f"--reference={path}"]),
        ):
            out = tmp_path / role / name
            may = (2,) if name in refused else (0, 2)
            status = faults.run("--mode=evaluate", f"--out={out}", scored, *flags, may=may)
            assert (out / "report.json").exists() == (status == 0)
    assert not Path("it_ran").exists()


def features(pixels: Any) -> Any:
    """uint8 [n, h, w, 3] -> [n, 3]: mean colours, in no time."""
    return pixels.mean(axis=(1, 2))


def test_images_to_continue_are_read_or_refused(
    faults: Faults, inputs: dict[str, Path], tiny_run: Path, tmp_path: Path
) -> None:
    for name, path in inputs.items():
        if name in GOOD and name != "plain":
            continue
        faults.run(
            "--mode=sample",
            "--stage=relay",
            "--seeds=0-3",
            f"--workdir={tiny_run}",
            f"--low_res={path}",
            f"--out={tmp_path / name}",
            may=(2,),  # none of them holds images of 8 x 8 pixels, by seed
            config=False,
        )


VERBS = {
    "train": [],
    "sample": ["--seeds=0-1"],
    "evaluate": ["--seeds=0-7"],
    "sweep": ["--sweep=fast", "--seeds=0-7"],
    "plot": ["--plot=grid"],
    "plan": ["--devices=1", "--hardware=H100"],
    "verify": [],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_spoiled_run_is_refused_in_a_line(
    faults: Faults, inputs: dict[str, Path], spoiled: Path, tmp_path: Path, verb: str
) -> None:
    config, flags = spoiled / "config.json", [f"--mode={verb}", *VERBS[verb]]
    text = config.read_text()
    for content in ("", "{", "[" * 100_000, "[]", '{"seed": "x"}', "\0\xff", "null"):
        config.write_text(content)
        faults.run(f"--workdir={spoiled}", *flags, may=(2,), config=False)
    config.unlink()
    faults.run(f"--workdir={spoiled}", *flags, may=(2,), config=False)
    config.mkdir()
    faults.run(f"--workdir={spoiled}", *flags, may=(2,), config=False)
    config.rmdir()
    config.write_text(text)
    if verb not in ("train", "verify", "plan"):
        for out in (inputs["file"] / "x", Path("/proc/x"), inputs["loop"], inputs["pipe_zip"]):
            faults.run(f"--workdir={spoiled}", *flags, f"--out={out}", may=(2,), config=False)
    if verb != "plan":
        for stage in ("base", "relay"):
            shutil.rmtree(spoiled / stage / "checkpoints")
            (spoiled / stage / "checkpoints").write_bytes(b"a file")
        faults.run(f"--workdir={spoiled}", *flags, may=(2,), config=False)


@pytest.mark.parametrize("verb", [*VERBS, "prepare"])
def test_flags_that_mean_nothing_are_refused_in_a_line(
    faults: Faults, tiny_run: Path, verb: str
) -> None:
    nonsense: dict[str, list[str]] = {
        "stage": ["middle", "\0", "x" * 1000],
        "seeds": ["", "a", "5-1", "-1", "9" * 5000, "0-99999999999", "1,,2"],
        "class": ["99", "cow", "-1", "\u00e9" * 500],
        "preset": ["quick", "x" * 1000],
        "format": ["gif"],
        "sweep": [
            ",",
            "quick",
            "heun:nothing=1",
            "fast:base.num_steps=-3",
            "heun:rho=nan",
            "a:b:c",
        ],
        "plot": ["nothing", "grid,," + "x" * 1000],
        "plot_images": ["-1", "many"],
        "devices": ["-1", "x"],
        "hardware": ["abacus"],
        "utilisation": ["nan", "-1", "x"],
        "topology": ["v9:1x1", ":::"],
        "reference_images": ["-5", "x"],
        "features": ["nothing", "os:path", "nothing:x", "x" * 1000],
        "inception": ["/nowhere/weights.pth"],
        "weights.base": ["/nowhere", "/nowhere@x", "gs://bucket/x"],
        "low_res": ["/nowhere"],
        "config.seed": ["x", "1.5", "-1", "9" * 50],
        "config.stages.base.sample.num_steps": ["0", "x", "9" * 30],
    }
    for name, values in nonsense.items():
        head = name.split(".")[0]
        verbs = commandline.VERBS if head == "config" else commandline.USED_BY.get(name, ())
        if verb not in (commandline.WEIGHTS_VERBS if head == "weights" else verbs):
            continue
        if verb == "train" and head in ("stage", "weights"):
            continue  # a finished run looks at neither weights nor a second time
        for value in values:
            if value == "" or (name == "topology" and verb == "plan"):
                continue
            run = [] if verb == "prepare" else [f"--workdir={tiny_run}"]
            run += (
                ["--out=/proc/x"]
                if "out" in commandline.USED_BY and verb in commandline.USED_BY["out"]
                else []
            )
            faults.run(
                f"--mode={verb}", f"--{name}={value}", *run, may=(2,), config=verb == "prepare"
            )


def test_files_that_are_no_weights_are_not_converted(
    faults: Faults, inputs: dict[str, Path], tmp_path: Path
) -> None:
    for name, path in inputs.items():
        faults.convert(str(path), f"--out={tmp_path / name}")
        faults.convert("--to-official", str(path), f"--out={tmp_path / name}.safetensors")
        assert not (tmp_path / name).exists()
    for arguments in ([], ["x"], ["x", "--out="], ["--nothing"], ["x", "--out=/proc/x"]):
        faults.convert(*arguments)
    assert not Path("it_ran").exists()
