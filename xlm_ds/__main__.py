"""`python -m xlm_ds STAGE …` is `xlm-ds STAGE …`."""

import sys

from xlm_ds.cli import main

sys.exit(main())
