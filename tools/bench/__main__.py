"""``python -m tools.bench``; see :mod:`.command`."""

from .command import main

if __name__ == "__main__":
    main()
