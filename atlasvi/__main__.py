"""``python -m atlasvi``: the command, where it is not on the path."""

from atlasvi.cli import main

if __name__ == "__main__":
    main()
