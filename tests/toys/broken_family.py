"""A stranger's family that does not import."""

raise ImportError("no module named 'not_there'")
