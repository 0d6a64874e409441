"""`python -m theloom.cli`."""

import sys

from theloom.cli.main import main

sys.exit(main())
