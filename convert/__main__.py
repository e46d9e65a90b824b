"""`python -m convert`."""

import sys

from mooer_jax.files import exit_on_sigterm

from .main import main

with exit_on_sigterm():
  sys.exit(main())
