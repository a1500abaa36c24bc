"""Architecture maps: one YAML file per model family."""
