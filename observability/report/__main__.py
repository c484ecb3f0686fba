"""`python -m observability.report`."""

import sys

from observability.report.command import main

sys.exit(main())
