"""Options as people give them: mappings, YAML files, arguments of transformers by name. Knows no run and no model."""
