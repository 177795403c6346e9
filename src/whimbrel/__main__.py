"""`python -m whimbrel`, and `torchrun -m whimbrel`."""

import sys

from whimbrel.cli import main

sys.exit(main())
