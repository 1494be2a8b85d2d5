"""`python -m layerscalpel` is `scalpel`, as `torchrun -m layerscalpel` needs it."""

import sys

try:
    from layerscalpel.cli import main

    sys.exit(main())
except KeyboardInterrupt:  # while it is still being imported
    sys.exit(130)
