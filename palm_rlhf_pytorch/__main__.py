"""`python -m palm_rlhf_pytorch`: the same commands as `palm-rlhf`."""

import sys

from palm_rlhf_pytorch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
