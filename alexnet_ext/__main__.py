"""``python -m alexnet_ext`` is ``alexnet``."""

from .cli import main

if __name__ == "__main__":
    main()
