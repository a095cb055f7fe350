"""What accelerators can do, and what a traced program asks of them.

The first are peaks that vendors publish, the second FLOPs counted in
the program before it is compiled: what a compiler makes of it is its
own affair, and two backends would not be comparable.
"""

import math
import re
from dataclasses import dataclass

from jax.extend import core


@dataclass(frozen=True)
class Device:
    """One chip or card as its vendor publishes it.

    peak: dense bfloat16 FLOP/s. memory: bytes of HBM. clock: Hz, of
    TPUs: the peak over the FLOPs per cycle of the compiler's own
    estimate for a large matrix product.
    """

    name: str
    peak: float
    memory: float
    clock: float = 0.0


DEVICES = (  # sources:
    Device("v4", 275e12, 32 * 2**30, 1.05e9),  # cloud.google.com/tpu/docs/v4
    Device("v5e", 197e12, 16e9, 1.50e9),  # cloud.google.com/tpu/docs/v5e
    Device("v5p", 459e12, 95e9, 1.75e9),  # cloud.google.com/tpu/docs/v5p
    Device("v6e", 918e12, 32e9, 1.75e9),  # cloud.google.com/tpu/docs/v6e
    Device("A100", 312e12, 80e9),  # NVIDIA A100 80GB SXM datasheet
    Device("H100", 989e12, 80e9),  # NVIDIA H100 SXM datasheet: 1,979 with sparsity, halved
)

# What JAX calls a device -> the entry with its peak. An
# A100 of 40 GB and an H200 compute like the cards named; an
# H100 on PCIe does not.
_KINDS = {
    r"TPU v4": "v4",
    r"TPU v5( lite|e)": "v5e",
    r"TPU v5p?": "v5p",
    r"TPU v6( lite|e)": "v6e",
    r"NVIDIA A100\b.*": "A100",
    r"NVIDIA (H100|H200|GH200)\b(?!.*(PCIe|NVL)).*": "H100",
}


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its `device_kind`; None where it is not known."""
    for pattern, name in _KINDS.items():
        if re.fullmatch(pattern, kind):
            return next(device.peak for device in DEVICES if device.name == name)
    return None


def matmul_flops(jaxpr: core.Jaxpr) -> int:
    """Twice the multiply-adds of every convolution and matrix product of a program.

    Those with padding are included. Loops of a known length count
    that often, of branches the dearest one, of formulations for
    several platforms the plain one; a `while` counts once.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            products = math.prod(shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * products
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size // outputs
        else:
            inner = [matmul_flops(sub) for sub in core.jaxprs_in_params(params)]
            # lax.platform_dependent: the default, which stands for
            # all platforms, has no name.
            if platforms := params.get("branches_platforms"):
                inner = [inner[platforms.index(None)]]
            once = max(inner, default=0) if name == "cond" else sum(inner)
            total += once * params.get("length", 1)
    return total


def si(value: float) -> str:
    """Three or four digits and a decimal prefix: 2.193e11 -> '219.3 G'."""
    power = min(max(int(math.log10(value) // 3), 0), 6) if value > 0 else 0
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"
