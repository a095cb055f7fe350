"""The picture `animation`: a few samples through all stages, as a film that repeats.

Frames are those of `filmstrip`: above the noisy state, at the
contrast of images, below what the network makes of it, a step to a
frame. Between two stages the film stands still at the hand-off: the
finished small image, pixel by pixel as large as the next stage's
patches, then the first state of the next stage. An animated WebP:
every browser shows it, without a script.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from relay_jax.plots.filmstrip import Frames, filmstrip
from relay_jax.plots.inputs import Inputs, Picture
from relay_jax.runtime.files import write_bytes
from relay_jax.sampling.pixels import to_uint8

SEEDS, STEPS = 4, 20  # at most: samples, and steps of each stage
SIDE, GAP, HEADER, FOOTER = 132, 6, 30, 12  # pixels of the film
ALONE = 216  # of an image, where one sample is shown
STEP_MS, HANDOFF_MS, END_MS = 110, 1100, 2200
# Bytes of an exact film; a larger one is stored as photographs.
EXACT_BYTES, QUALITY = 500_000, 60
PAPER, INK, SOFT = (255, 255, 255), (25, 30, 35), (217, 222, 227)
STAGES = ((31, 111, 180), (209, 89, 15), (43, 138, 62))  # colours of the stages, in turn


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture of the film.

    states, images: float32 [n, h, w, c], above and below; caption:
    one line; position: of the whole way, 0 to 1; stage: its number.
    """

    states: np.ndarray
    images: np.ndarray
    caption: str
    position: float
    stage: int
    milliseconds: int = STEP_MS


def frames(strip: Sequence[Frames], sigma_data: float) -> Iterator[Frame]:
    """All frames of a filmstrip, with the hand-offs. Source: docs/math.md section 6."""
    # A hand-off has a share of the way, too, so that it is seen there.
    total = sum(len(part.steps) for part in strip) + len(strip) - 1
    done = 0
    for number, part in enumerate(strip):
        size = part.final.shape[1]
        for k, sigma in enumerate(part.sigmas):
            first = k == 0 and part.from_handoff
            words = f"hand-off to {part.stage}" if first else f"{part.stage}, {size} px"
            yield Frame(
                states=part.states[k] * (sigma_data / np.hypot(sigma, sigma_data)),
                images=part.denoised[k],
                caption=f"{words}: step {part.steps[k] + 1} of {part.total_steps}, "
                f"sigma {sigma:.2g}",
                position=(done + k) / total,
                stage=number,
                milliseconds=HANDOFF_MS if first else STEP_MS,
            )
        done += len(part.steps)
        last = number == len(strip) - 1
        words = f"{part.stage}, {size} px: finished"
        if not last and strip[number + 1].from_handoff:
            words += f"; {strip[number + 1].stage} goes on from here"
        yield Frame(
            states=part.final,
            images=part.final,
            caption=words,
            position=done / total,
            stage=number,
            milliseconds=END_MS if last else HANDOFF_MS,
        )
        done += 1


def draw_frame(frame: Frame, begins: Sequence[float]) -> Image.Image:
    """One frame as a picture. begins: where each stage begins on the way."""
    # One sample: its state and image beside each other, larger.
    rows = [np.concatenate([frame.states, frame.images])]
    side = ALONE
    if len(frame.states) > 1:
        rows, side = [frame.states, frame.images], SIDE
    rows = [_sized(images, side) for images in rows]
    width = max(len(rows[0]), 2) * (side + GAP) - GAP
    height = HEADER + len(rows) * (rows[0].shape[1] + GAP) + FOOTER
    canvas = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(canvas)
    colour = STAGES[frame.stage % len(STAGES)]
    pen.text((2, 5), frame.caption, fill=colour, font=ImageFont.load_default(18))
    for row, images in enumerate(rows):
        y = HEADER + row * (images.shape[1] + GAP)
        for column, image in enumerate(images):
            canvas.paste(Image.fromarray(image), (column * (side + GAP), y))
    y = height - FOOTER + 2
    ends = [*begins[1:], 1.0]
    for stage, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        shown = min(max(frame.position, begin), end)
        pen.rectangle((begin * width, y, max(end * width - 3, 0), y + 6), fill=SOFT)
        if shown > begin:
            filled = (begin * width, y, max(shown * width - 3, begin * width), y + 6)
            pen.rectangle(filled, fill=STAGES[stage % len(STAGES)])
    return canvas


def _sized(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 [n, h', side, 3]: enlarged by repeating pixels where it can be, else averaged."""
    pixels = to_uint8(images)
    h, w = pixels.shape[1:3]
    size = (side, round(side * h / w))
    method = Image.Resampling.NEAREST if w <= side else Image.Resampling.BOX
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=-1)
    return np.stack([np.asarray(Image.fromarray(p).resize(size, method)) for p in pixels])


def film(strip: Sequence[Frames], sigma_data: float) -> bytes:
    """An animated WebP that repeats for ever."""
    shown = list(frames(strip, sigma_data))
    begins = [next(f.position for f in shown if f.stage == number) for number in range(len(strip))]
    pictures = [draw_frame(frame, begins) for frame in shown]
    options: dict[str, Any] = {
        "save_all": True,
        "append_images": pictures[1:],
        "duration": [frame.milliseconds for frame in shown],
        "loop": 0,
        "method": 2,
    }
    # The noise of large images has no exact form in few bytes.
    exact = io.BytesIO()
    pictures[0].save(exact, "webp", lossless=True, quality=40, **options)
    if exact.tell() <= EXACT_BYTES:
        return exact.getvalue()
    lossy = io.BytesIO()
    pictures[0].save(lossy, "webp", quality=QUALITY, **options)
    return lossy.getvalue()


def write_film(strip: Sequence[Frames], sigma_data: float, path: Path) -> None:
    """Writes the film, whole or not at all. Raises StorageError."""
    write_bytes(path, film(strip, sigma_data))


def plot_animation(inputs: Inputs) -> None:
    """animation.webp and animation.json, of a few seeds."""
    seeds = inputs.seeds(SEEDS)
    classes = inputs.classes(seeds)
    stages = [(stage, inputs.params(stage)[0]) for stage in inputs.stages]
    strip = filmstrip(stages, seeds, classes, STEPS)
    write_film(strip, inputs.stages[0].process.sigma_data, inputs.out / "animation.webp")
    numbers = {"seeds": seeds, "classes": classes, "stages": [each.describe() for each in strip]}
    inputs.write("animation", numbers)


PICTURE = Picture(plot_animation, ("all checkpoints",), ending="webp")
