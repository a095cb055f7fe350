"""benchmarks/experiment.py: arms with the same training FLOPs, continued budgets, one table."""

import signal
from dataclasses import replace

import pytest

from benchmarks import experiment
from benchmarks.experiment import Arm, Experiment, Trial
from benchmarks.experiment_results import differences, figure, findings, summary, table
from benchmarks.experiments import ablations, calls, equal_compute, equal_compute_gpu
from relay_jax.planning.cost import train_flops
from relay_jax.runtime.files import read_json
from tests.conftest import command_line, content, run_main


@pytest.mark.parametrize("module", [ablations, calls, equal_compute, equal_compute_gpu])
def test_every_arm_can_be_built_and_trains_with_the_same_flops(module, tmp_path):
    whole = module.EXPERIMENT
    for arm in whole.arms:
        trial = Trial(whole, arm, 0, tmp_path, {})
        images = trial.images(1.0)
        flops = sum(images[stage.name] * train_flops(stage) for stage in trial.stages)
        assert flops == pytest.approx(whole.flops, rel=0.01)
        assert list(images) == list(arm.shares)


def test_budgets_continue_one_training_and_make_one_table(tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.py"
    made = "from tests.conftest import tiny_relay\n\n\n"
    config.write_text(made + "def get_config(_=''):\n    return tiny_relay()\n")
    commands = []

    def run(*arguments):
        commands.append(arguments)
        with command_line(*arguments):
            run_main()

    monkeypatch.setattr(experiment, "main", run)  # in this process, which has everything loaded
    whole = Experiment(
        name="calls",
        config=str(config),
        flops=0.0,
        budgets=(0.5, 1.0),
        samples=24,
        features="random-conv",
        sweep=("draft", "fast"),
        arms=(Arm("relay", shares={"base": 0.5, "relay": 0.5}),),
    )
    trial = Trial(whole, whole.arms[0], 0, tmp_path, {})
    each = {stage.name: train_flops(stage) for stage in trial.stages}
    # 32 and 64 images of the relay, more of the cheaper base.
    whole = replace(whole, flops=2 * 64 * each["relay"])
    trial = Trial(whole, whole.arms[0], 0, tmp_path, {})
    for budget in whole.budgets:
        trial.run(budget)
    assert len(commands) == 4
    trial.run(1.0)  # is there, and not made again
    assert len(commands) == 4
    # An arm that differs in its relay alone trains no base.
    other = Arm("other", shares=whole.arms[0].shares, base="relay")
    other = replace(trial, experiment=replace(whole, arms=(*whole.arms, other)), arm=other)
    other.run(1.0)
    bases = [content(t.workdir / "base" / "checkpoints") for t in (trial, other)]
    assert bases[0] == bases[1]

    experiment.collect(whole, [trial], tmp_path)
    assert capsys.readouterr().out.endswith(f"look at {tmp_path / 'report.html'}\n")
    page = (tmp_path / "report.html").read_text()
    assert "Experiment: calls" in page and page.count("<img") == 2 and "Not finished" not in page
    assert page.count("<td>relay</td>") == 4  # three rows of scores, one of the arm
    assert "FD-random-conv with the most training: relay " in page
    assert "base 50%, relay 50%" in page
    assert " --collect</pre>" in page
    rows = read_json(tmp_path / "calls.json")["rows"]
    assert [row["sampler"] for row in rows] == ["draft", "draft", "fast"]
    assert [row["images"]["relay"] for row in rows] == [32, 64, 64]
    assert rows[-1]["training_flops"] == sum(
        each[name] * images for name, images in rows[-1]["images"].items()
    )
    text = (tmp_path / "calls.md").read_text()
    assert (
        text.count("| relay |") == 3 and "Differences" not in text and "| FD | MIND | KID |" in text
    )
    assert (tmp_path / "calls.png").exists() and (tmp_path / "grid-relay.png").exists()


def test_a_command_that_fails_ends_the_experiment_with_its_status():
    with pytest.raises(SystemExit) as stopped:
        experiment.main("--config=nothing")
    assert stopped.value.code == 2


def test_sigterm_reaches_the_command_and_its_status_comes_back(tmp_path, monkeypatch):
    command = tmp_path / "python"
    # Stopped as training is: by a signal to the process above, and with status 75.
    command.write_text("#!/bin/sh\ntrap 'exit 75' TERM\nkill -TERM $PPID\nsleep 9 & wait\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setattr(experiment.sys, "executable", str(command))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        experiment.main("--workdir=run")
    assert stopped.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_mean_over_seeds_has_the_larger_of_spread_and_sampling_error():
    def row(value, error):
        score = {"FD": {"value": value, "error": error}}
        return {"arm": "a", "budget": 1.0, "sampler": "fast", "scores": score}

    (wide,) = summary([row(1.0, 0.1), row(3.0, 0.1)])
    assert wide["scores"]["FD"] == {"value": 2.0, "error": pytest.approx(2**0.5)}
    (narrow,) = summary([row(2.0, 0.5), row(2.0, 0.3)])
    assert narrow["scores"]["FD"] == {"value": 2.0, "error": 0.4}


def test_arms_are_compared_with_the_first_one_of_their_seed_and_sampler():
    def row(arm, seed, sampler, value):
        scores = {"FD": {"value": value, "error": 0.5}}
        return {"arm": arm, "seed": seed, "budget": 1.0, "sampler": sampler, "scores": scores}

    rows = [row("a", 0, "safe", 9.0), row("a", 1, "safe", 7.0), row("a", 0, "fast", 5.0)]
    assert differences(rows) == []
    rows += [row("a", 0, "safe:x=1", 9.5), row("a", 1, "safe:x=1", 7.25)]
    rows += [row("b", 0, "safe", 8.0), row("b", 0, "fast", 1.0), row("b", 2, "fast", 99.0)]
    assert differences(rows) == [
        ["arm", "budget", "sampler", "FD"],
        ["a", "1", "safe:x=1", "+0.38 (+0.5, +0.25)"],
        ["b", "1", "safe", "-1"],
        ["b", "1", "fast", "-4"],
    ]


def test_real_images_are_beside_the_arms(tmp_path):
    def row(arm, flops, sampler, value):
        scores = {"FD": {"value": value, "error": 0.5}}
        costs = {"training_flops": flops, "flops": 1e9, "calls": 9, "seeds": 1}
        return {"arm": arm, "sampler": sampler, "scores": scores, "real": {}, **costs}

    rows = [row("a", 1e9, "safe", 9.0), row("a", 2e9, "safe", 7.0), row("a", 2e9, "fast", 8.0)]
    rows.append(row("b", 2e9, "safe", 6.0))
    assert len(table(rows)) == 5  # a head, and nothing that was not scored
    assert findings(rows) == ["FD with the most training: a 7 ± 0.5, b 6 ± 0.5."]
    rows[0]["real"] = {"FD": {"value": 3.0, "error": 0.1}}
    assert table(rows)[-1] == ["as many real images", "", "", "", "", "", "3 ± 0.1"]
    assert findings(rows)[0].endswith("b 6 ± 0.5; real images 3 ± 0.1.")
    rows[-1]["scores"] = {**rows[-1]["scores"], "KID": {"value": 0.1, "error": 0.01}}
    figure(rows, tmp_path / "curves.png")  # an arm without a score that another one has
    assert (tmp_path / "curves.png").exists()
