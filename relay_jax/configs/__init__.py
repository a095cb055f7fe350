"""The configurations by one name everywhere: `from relay_jax.configs import default`.

In a checkout they lie in the top-level folder `configs`, which this
package points to; an installed package has copies of them here
(pyproject.toml, package-dir).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers do not follow the path

    def __getattr__(name: str) -> Any: ...


__path__ = [str(Path(__file__).parents[2] / "configs")]
