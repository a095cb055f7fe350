"""The processes that a configuration can name."""

from relay_jax.diffusion.cascade import Cascade
from relay_jax.diffusion.linear import LinearRelay
from relay_jax.diffusion.process import EdmProcess, RelayProcess

# stages.STAGE.process.kind -> class
PROCESSES: dict[str, type[EdmProcess]] = {
    "edm": EdmProcess,
    "relay": RelayProcess,
    "relay_linear": LinearRelay,
    "cascade": Cascade,
}
