"""`python -m robustlayers`, and `torchrun ... -m robustlayers`: the command line."""

from robustlayers.cli.main import main

if __name__ == "__main__":
    main()
