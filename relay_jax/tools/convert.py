"""`python -m relay_jax.tools.convert`, the command's name in earlier versions.

Scripts and notes of users have it, and it costs nothing to
answer: relay_jax.official.convert does the work. Nothing else
belongs in this folder.
"""

import sys

from relay_jax.official.convert import main

if __name__ == "__main__":
    main(sys.argv)
