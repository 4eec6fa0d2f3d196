"""`python -m commlib.cli`: the command without its script."""

import sys

from commlib.cli import main

sys.exit(main())
