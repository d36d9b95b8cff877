"""``python -m protomem_kernels`` is ``protomem``."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu-check"]:  # before anything of cli/ is imported: it meets machines that have torch alone
        from protomem_kernels.gpu_check import main as gpu_check

        sys.exit(gpu_check())
    from protomem_kernels.cli import main

    main()
