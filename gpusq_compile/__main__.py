"""`python -m gpusq_compile` is `gpusq-compile`."""

from gpusq_compile.cli import main

if __name__ == "__main__":
    main()
