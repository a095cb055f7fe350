"""The picture `snr`: signal over noise by frequency, for neighbouring stages (RDM, figure 2).

The same noise on the same images at two resolutions: white noise
leaves the low frequencies of the larger one patch^2 stronger, block
noise does not (spectra.py has the equations).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relay_jax.data.images import to_float
from relay_jax.diffusion.block_noise import block_noise_power
from relay_jax.plots import style
from relay_jax.plots.inputs import Inputs, Picture
from relay_jax.plots.spectra import dct_power, frequencies, radial_bands
from relay_jax.resolution import Resolution, as_resolution, height_width, size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# White noise at both resolutions, block noise, the noise of the
# stage. Block noise lies on the curve of the small images, which is
# therefore wide and pale.
CURVES: tuple[dict[str, Any], ...] = (
    dict(color="tab:blue", lw=5, alpha=0.35),
    dict(color="tab:red"),
    dict(color="tab:blue"),
    dict(color="tab:orange", ls="--"),
)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One curve: SNR in decibels by frequency in cycles per image width, each [bands]."""

    name: str
    resolution: Resolution
    frequency: np.ndarray
    decibels: np.ndarray


def ratio(name: str, images: np.ndarray, noise: np.ndarray) -> Ratio:
    """Equation (2) of spectra.py. images: [n, h, w, c]; noise: its power [h, w]."""
    resolution = as_resolution(images.shape[1:3])
    bands = radial_bands(resolution)
    values = bands.mean(dct_power(images)) / bands.mean(noise)
    # Bands without any signal are minus
    # infinity, which JSON shows as null.
    with np.errstate(divide="ignore"):
        return Ratio(
            name=name,
            resolution=resolution,
            frequency=bands.mean(frequencies(resolution)),
            decibels=10 * np.log10(values),
        )


def resolution_ratios(
    low: np.ndarray, high: np.ndarray, sigma: float, stage_noise: np.ndarray
) -> list[Ratio]:
    """White noise on both sets of images, block noise and the stage's noise on the larger ones.

    low: [n, h, w, c], high: [n, p h, p w, c], the same real images;
    sigma: level of all noises; stage_noise: power of the stage's
    noise at sigma 1, [p h, p w]. Source: RDM, section 2.2.
    """
    patch, power = high.shape[1] // low.shape[1], sigma**2
    block = power * block_noise_power(high.shape[1:3], patch)
    small, large = (size_text(as_resolution(images.shape[1:3])) for images in (low, high))
    curves = [
        ratio(f"{small} px, white noise", low, np.full(low.shape[1:3], power)),
        ratio(f"{large} px, white noise", high, np.full(high.shape[1:3], power)),
        ratio(f"{large} px, block noise of {patch} px", high, block),
    ]
    # A stage of white noise alone would repeat the second curve.
    if not np.allclose(stage_noise, 1):
        curves.append(ratio(f"{large} px, noise of the relay stage", high, power * stage_noise))
    return curves


def snr_figure(pairs: Sequence[tuple[str, list[Ratio]]], title: str) -> "Figure":
    """One panel for each pair of resolutions: its title, and curves of `resolution_ratios`."""
    figure = style.make_figure(7.5 * len(pairs), 5.2, title)
    for number, (name, curves) in enumerate(pairs):
        axes = figure.add_subplot(1, len(pairs), number + 1)
        for curve, look in zip(curves, CURVES, strict=False):
            axes.plot(curve.frequency, curve.decibels, label=curve.name, **look)
        small = curves[0].resolution
        end = height_width(small)[1] / 2  # along both axes, as f counts per image width
        style.mark_line(axes, end, f"end of {size_text(small)} px ", "grey")
        axes.set(ylabel="signal-to-noise ratio, dB", title=name)
        style.frequency_axis(axes, curves[1].frequency[-1])
        axes.legend(loc="lower left")
    return figure


def plot_snr(inputs: Inputs) -> None:
    """snr.png and snr.json, at the level where each relay stage starts."""
    pairs, numbers = [], []
    for before, stage in zip(inputs.stages, inputs.stages[1:], strict=False):
        if not stage.process.has_handoff:
            continue
        sigma = float(stage.sampler.levels()[0])
        low, high = (to_float(inputs.real(s.resolution)[0]) for s in (before, stage))
        stage_noise = stage.sample_process.noise_power(stage.resolution)
        curves = resolution_ratios(low, high, sigma, stage_noise)
        sizes = " and ".join(size_text(s.resolution) for s in (before, stage))
        pairs.append((f"{sizes} px, sigma {sigma:.3g}", curves))
        numbers.append(
            {
                "stage": stage.name,
                "sigma": sigma,
                "curves": [asdict(curve) for curve in curves],
            }
        )
    count = len(inputs.positions())
    title = f"Power of {count} real images over that of the noise, by DCT frequency"
    style.save(snr_figure(pairs, title), inputs.out / "snr.png")
    inputs.write("snr", inputs.describe() | {"images": count, "pairs": numbers})


PICTURE = Picture(plot_snr, ("a relay", "a hand-off", "real images"))
