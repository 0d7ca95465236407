"""A check of each user of IPIs: a module each, found by its name (``registry``)."""
