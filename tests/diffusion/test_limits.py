"""Numbers that are none on the devices are refused, those of published samplers are not."""

import math

import numpy as np
import pytest

from relay_jax.diffusion.grid import edm_sigmas
from relay_jax.diffusion.limits import check_levels, check_tables, is_finite
from relay_jax.diffusion.process import EdmProcess, RelayProcess


@pytest.mark.parametrize("rho", [1.0, 7.0, 100.0])
@pytest.mark.parametrize("steps", [1, 2, 18, 256, 10_000])
def test_usual_grids_are_let_through_with_their_ends(rho: float, steps: int) -> None:
    sigmas = edm_sigmas(steps, 0.002, 80.0, rho)
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0
    np.testing.assert_allclose(sigmas[0], 80, rtol=1e-12)
    assert steps == 1 or abs(sigmas[-2] / 0.002 - 1) < 1e-9


@pytest.mark.parametrize(
    ("steps", "low", "high", "rho"),
    [
        (18, 0.002, 80.0, 1e-3),  # overflows
        (18, 0.002, 80.0, 1e-310),
        (18, 0.002, 80.0, 1e16),  # rounds to equal levels
        (18, 1e-50, 80.0, 7.0),  # 0 as float32
        (18, 0.002, 1e39, 7.0),  # infinite as float32
        (18, 79.9999999, 80.0, 7.0),  # equal as float32
        (0, 0.002, 80.0, 7.0),
        (10**12, 0.002, 80.0, 7.0),
        (18, 0.002, 80.0, math.nan),
        (18, 0.002, math.inf, 7.0),
        (18, 0.002, math.nan, 7.0),
        (18, 0.0, 80.0, 7.0),
    ],
)
def test_grids_that_do_not_fall_or_are_not_finite_are_refused(
    steps: int, low: float, high: float, rho: float
) -> None:
    with pytest.raises(ValueError, match=r"num_steps|sigma_min|rho") as error:
        edm_sigmas(steps, low, high, rho)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_numbers_are_finite_where_float32_is() -> None:
    values = (0.0, 3e38, -1e-60, 4e38, math.inf, -math.inf, math.nan)
    assert [is_finite(value) for value in values] == [True] * 3 + [False] * 4


def test_levels_without_a_finite_loss_are_refused() -> None:
    check_levels((-8.4, 6.0), 0.5, math.inf)
    check_levels((-60.0, 0.0), 0.5, 1e5)  # the weight of small levels is limited
    for ends, data in (((-60.0, 0.0), 0.5), ((0.0, 90.0), 0.5), ((-8.4, 6.0), 1e-25)):
        with pytest.raises(ValueError, match="whose loss is no finite number"):
            check_levels(ends, data, math.inf)


def test_published_processes_can_be_trained_and_others_not() -> None:
    EdmProcess().check_training()
    RelayProcess().check_training()
    RelayProcess(cdf_max=1.0).check_training()
    with pytest.raises(ValueError, match="sigma_floor 50"):
        RelayProcess(sigma_floor=50.0).check_training()
    with pytest.raises(ValueError, match="sigma_floor 1e-300"):
        RelayProcess(sigma_floor=1e-300).check_training()
    with pytest.raises(ValueError, match="P_mean must be a finite number, not nan"):
        EdmProcess(P_mean=math.nan)
    with pytest.raises(ValueError, match="whose loss is no finite number"):
        EdmProcess(P_mean=100.0).check_training()


def test_a_table_names_its_column() -> None:
    check_tables({"sigma": np.arange(3.0)})
    with pytest.raises(ValueError, match="gamma of the sampler's steps is not finite"):
        check_tables({"sigma": np.arange(3.0), "gamma": np.array([1.0, 1e39])})
