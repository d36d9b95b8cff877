"""``python -m protomem_kernels`` is ``protomem``."""

from protomem_kernels.cli import main

if __name__ == "__main__":
    main()
