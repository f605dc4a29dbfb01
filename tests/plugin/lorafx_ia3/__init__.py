"""A pass for lorafx in a package of its own."""
