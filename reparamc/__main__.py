"""``python -m reparamc``: the command line."""

import sys

from reparamc.cli import main

sys.exit(main())
