"""`python -m crosstill`, which is also what torchrun starts."""

from crosstill.cli import main

if __name__ == "__main__":
    main()
