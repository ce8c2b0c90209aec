"""`python -m dax`, the same as the command `dax`."""

from dax.cli.main import main

if __name__ == "__main__":
    main()
