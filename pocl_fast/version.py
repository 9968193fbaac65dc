"""The version of the package; pyproject.toml and `pocl_fast.__version__` read it here."""

__version__ = "0.1.0"
