"""The picture `filmstrip`: samples on their way through all stages, the noisy states of some
steps and what the network makes of each.

The states are the sampler's (Samples.states), so the last frame is
the sample itself. Each is shown beside D(x, sigma), one more call of
the guided network. Where the first stage adds churn, its sampler
asks the network a little above sigma, at the state with the churn's
noise; the frame shows the state before. A stage that hands over its
state, not a finished image (handoff "noise"), ends with this state,
and what the network makes of it takes the place of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.plots import style
from relay_jax.plots.inputs import Inputs, Picture
from relay_jax.resolution import as_resolution, size_text
from relay_jax.runtime.devices import in_haste
from relay_jax.sampling.chain import condition_of, sample_stage
from relay_jax.stage import Guided, Stage, joined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS, COLUMNS = 3, 7  # at most: rows, and steps of each stage


@dataclass(frozen=True, kw_only=True)
class Frames:
    """One stage of a filmstrip.

    steps: [k] rising; sigmas: [k]; states, denoised: float32
    [k, n, h, w, c], before each of these steps; final:
    [n, h, w, c]. A stage that hands over a state has it last, at
    step total_steps, and what it denoises to as `final`. handed:
    what the next stage continues. from_handoff: whether the first
    state is that of a hand-off.
    """

    stage: str
    steps: np.ndarray
    total_steps: int
    sigmas: np.ndarray
    states: np.ndarray
    denoised: np.ndarray
    final: np.ndarray
    handed: np.ndarray
    from_handoff: bool

    def describe(self) -> dict[str, Any]:
        """The numbers of the picture: how far each frame is from the sample."""
        pixels = (2, 3, 4)
        return {
            "stage": self.stage,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "sigmas": self.sigmas,
            "state_std": self.states.std(axis=pixels),
            "denoised_std": self.denoised.std(axis=pixels),
            "denoised_rms_to_final": np.sqrt(
                np.mean((self.denoised - self.final) ** 2, axis=pixels)
            ),
        }


def spread(total: int, count: int) -> np.ndarray:
    """At most `count` steps of 0 ... total - 1, evenly spread, the first and the last among
    them."""
    return np.unique(np.round(np.linspace(0, total - 1, min(count, total))).astype(int))


def _frames(
    stage: Stage,
    steps: np.ndarray,
    params: dict | Guided,
    seed: jax.Array,
    label: jax.Array,
    low_res: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """States and denoised images [k, h, w, c] and the sample [h, w, c] of one seed.

    steps: total_steps stands for the end. seed, label: [1]; low_res:
    [1, h/p, w/p, c] or None.
    """
    samples = sample_stage(stage, params, seed, label, low_res, return_states=True)
    assert samples.states is not None
    # Not joined to them: a copy of all states for the sake of one.
    end = int(steps[-1]) == len(samples.states)
    states = samples.states[steps[:-1] if end else steps]
    states = jnp.concatenate([states, samples.final[None]]) if end else states
    sigmas = jnp.asarray(stage.sampler.levels()[steps], jnp.float32)
    # One step after the other: the network stands once in the
    # program, and takes the memory of one image.
    denoise = stage.denoiser(params, label, condition_of(stage, seed, low_res))
    denoised = jax.lax.map(lambda frame: denoise(*frame), (states, sigmas))
    return states[:, 0], denoised[:, 0], samples.final[0]


def filmstrip(
    stages: Sequence[tuple[Stage, dict | Guided]],
    seeds: Sequence[int],
    classes: np.ndarray,
    columns: int,
) -> list[Frames]:
    """All stages, each with its parameters, for seeds [n] and classes [n].

    columns: steps of each stage, at most. One seed at a time:
    memory holds all states of one image. Raises ValueError for
    fewer than two columns.
    """
    if columns < 2:
        raise ValueError(f"a filmstrip needs at least 2 steps of each stage, not {columns}")
    strip: list[Frames] = []
    # The samples of one stage, not clipped, are what the next one
    # starts from, as in the chain.
    params_of = {stage.name: params for stage, params in stages}
    for stage in joined([stage for stage, _ in stages]):
        params, sigmas = params_of[stage.name], stage.sampler.levels()
        # A level above 0 at the end is that
        # of a state that is handed over.
        stops = sigmas[-1] > 0
        steps = spread(len(sigmas) if stops else len(sigmas) - 1, columns)
        run, frames = jax.jit(partial(_frames, stage, steps), compiler_options=in_haste()), []
        for n, (seed, label) in enumerate(zip(seeds, classes, strict=True)):
            low_res = strip[-1].handed[n : n + 1] if strip else None
            one = run(
                params,
                np.array([seed], np.uint32),
                np.array([label], np.int32),
                low_res,
            )
            # To the host at once, as the states of all seeds may be
            # too many for a device.
            frames.append(jax.device_get(one))
        states, denoised, finals = zip(*frames, strict=True)
        handed = np.stack(finals)
        strip.append(
            Frames(
                stage=stage.name,
                steps=steps,
                total_steps=len(sigmas) - 1,
                sigmas=sigmas[steps],
                states=np.stack(states, axis=1),
                denoised=np.stack(denoised, axis=1),
                final=np.stack(denoised, axis=1)[-1] if stops else handed,
                handed=handed,
                from_handoff=stage.process.has_handoff,
            )
        )
    return strip


def filmstrip_figure(
    strip: Sequence[Frames], rows: Sequence[str], sigma_data: float, title: str
) -> "Figure":
    """Two rows per seed, state above denoised image; a column per step, then the sample.

    rows: what each seed is called. States are shown at the contrast
    of images: x sigma_data / sqrt(sigma^2 + sigma_data^2).
    """
    widths = [width for frames in strip for width in (style.GAP, *[1.0] * len(frames.steps))]
    widths += [style.GAP, 1.0]
    height = 2.35 * style.aspect(strip[-1].final[0])
    figure = style.make_figure(1.15 * sum(widths) + 1, height * len(rows) + 1, title)
    grid = figure.add_gridspec(
        2 * len(rows), len(widths), wspace=0.05, hspace=0.05, width_ratios=widths
    )
    # A figure of subplots in a grid, not one large picture:
    # each title stands over its column whatever the
    # resolutions of the stages.
    column = 0
    for number, frames in enumerate(strip):
        for k in range(len(frames.steps)):
            column += 2 if k == 0 else 1  # a gap before each stage
            scale = sigma_data / np.hypot(frames.sigmas[k], sigma_data)
            for n, name in enumerate(rows):
                above = figure.add_subplot(grid[2 * n, column - 1])
                below = figure.add_subplot(grid[2 * n + 1, column - 1])
                style.show(above, frames.states[k, n] * scale)
                style.show(below, frames.denoised[k, n])
                if n == 0:
                    head = _head(frames, k)
                    above.set_title(head, fontsize="small", loc="left")
                if number == k == 0:
                    above.set_ylabel(f"{name}\nstate", fontsize="small")
                    below.set_ylabel("denoised", fontsize="small")
    for n in range(len(rows)):
        axes = figure.add_subplot(grid[2 * n : 2 * n + 2, -1])
        style.show(axes, strip[-1].final[n])
        axes.set_title("sample", fontsize="small", loc="left")
    return figure


def _head(frames: Frames, k: int) -> str:
    """Three lines above a column; the first names the stage at its first step alone."""
    size = size_text(as_resolution(frames.final.shape[1:3]))
    name = f"{frames.stage}, {size} px" + (" (hand-off)" if frames.from_handoff else "")
    handed = frames.steps[k] == frames.total_steps
    step = "handed over" if handed else f"step {frames.steps[k] + 1}/{frames.total_steps}"
    return f"{name if k == 0 else ''}\n{step}\nsigma {frames.sigmas[k]:.3g}"


def plot_filmstrip(inputs: Inputs) -> None:
    """filmstrip.png and filmstrip.json, of a few seeds."""
    seeds = inputs.seeds(SEEDS)
    classes = inputs.classes(seeds)
    stages = [(stage, inputs.params(stage)[0]) for stage in inputs.stages]
    strip = filmstrip(stages, seeds, classes, COLUMNS)
    rows = [f"seed {seed}" for seed in seeds]
    if inputs.stages[-1].num_classes:
        rows = [f"{row}\nclass {label}" for row, label in zip(rows, classes, strict=True)]
    title = "Samples on their way through the stages (states scaled to the contrast of images)"
    figure = filmstrip_figure(strip, rows, inputs.stages[0].process.sigma_data, title)
    style.save(figure, inputs.out / "filmstrip.png")
    numbers = {
        "seeds": seeds,
        "classes": classes,
        "stages": [each.describe() for each in strip],
    }
    inputs.write("filmstrip", numbers)


PICTURE = Picture(plot_filmstrip, ("all checkpoints",))
