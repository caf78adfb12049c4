"""``python -m tools.plot``; see :mod:`.losses`."""

from .losses import main

if __name__ == "__main__":
    main()
