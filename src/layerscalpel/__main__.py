"""`python -m layerscalpel` is `scalpel`, as `torchrun -m layerscalpel` needs it."""

import sys

from layerscalpel.cli import main

sys.exit(main())
