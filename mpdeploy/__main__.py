"""`python -m mpdeploy`, so that `torchrun -m mpdeploy` works."""

from mpdeploy.cli import main

if __name__ == "__main__":
    main()
