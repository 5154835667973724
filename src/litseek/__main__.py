"""`python -m litseek …`, also under torchrun: the same program as the `litseek` command."""

from litseek.cli.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
