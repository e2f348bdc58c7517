"""``python -m sleepify``: the command line, see `sleepify.cli`."""

from sleepify.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
