"""Every option, declared once: name, type, range, default and meaning.

The command line, YAML files, `HfArgumentParser` and `PoclConfig` read these declarations: `PoclConfig` inherits the
groups, and a field's docstring is also its `metadata["help"]`. To add one see docs/adding-an-option.md.

Knows no torch, no transformers and no files. `pocl_fast.settings.configuration` reads options from YAML.
"""
