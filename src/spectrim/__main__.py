"""``python -m spectrim`` is the command line."""

from spectrim.cli import main

if __name__ == "__main__":
    main()
