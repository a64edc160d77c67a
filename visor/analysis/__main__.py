"""`python -m visor.analysis --model MODEL --suite SUITE`: `evaluations.analyses`, which knows suites and folders."""

import sys

if __name__ == "__main__":
    from evaluations.analyses import main

    sys.exit(main())
