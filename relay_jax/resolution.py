"""The size of images in pixels: an int for squares, (height, width) for others.

A square is an int everywhere, in configurations, files and records,
so that one size is written in one way.
"""

from collections.abc import Sequence

Resolution = int | tuple[int, int]

MAX_SIDE = 2**53  # beyond it whole numbers and float64 differ


def height_width(resolution: Resolution) -> tuple[int, int]:
    """Pixels along both axes; tuples of it have the order of sizes of one shape."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def as_resolution(size: int | Sequence[int]) -> Resolution:
    """An int or [height, width] as the program writes it: a square as an int.

    Raises ValueError for anything else.
    """
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or any(type(side) is not int or not 0 < side <= MAX_SIDE for side in sides):
        raise ValueError(
            f"resolution must be a positive whole number, or (height, width), not {size!r:.60}"
        )
    height, width = sides
    return height if height == width else (height, width)


def reduced(resolution: Resolution, factor: int) -> Resolution:
    """The size of images whose every pixel stands for factor x factor; rounded down."""
    if isinstance(resolution, int):
        return resolution // factor
    return resolution[0] // factor, resolution[1] // factor


def check_enlarged(resolution: Resolution, factor: int, low: Resolution, before: str) -> None:
    """Raises ValueError unless a stage's size is `factor` times that of the stage before it."""
    height, width = height_width(low)
    if (height * factor, width * factor) != height_width(resolution):
        raise ValueError(
            f"resolution {size_text(resolution)} is not {factor} (patch) times the "
            f"{size_text(low)} of stage {before}"
        )


def smaller(size: Resolution, than: Resolution) -> bool:
    """Whether images of a size must be enlarged to cover another one."""
    return any(a < b for a, b in zip(height_width(size), height_width(than), strict=True))


def size_text(resolution: Resolution) -> str:
    """'64', or '64x96' for 64 rows of 96 pixels."""
    return "x".join(map(str, [resolution] if isinstance(resolution, int) else resolution))


def pixels_text(*resolutions: Resolution) -> str:
    """'8 and 64 px', or '64x96 px (height x width)', where sizes of files stand beside it."""
    order = "" if all(isinstance(size, int) for size in resolutions) else " (height x width)"
    return f"{' and '.join(map(size_text, resolutions))} px{order}"
