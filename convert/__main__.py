"""`python -m convert`."""

import sys

from .main import main

sys.exit(main())
