"""Settings of the property tests."""

from hypothesis import settings

# A deadline per example measures the neighbours of a busy machine, not the code.
settings.register_profile("shmipi", deadline=None)
settings.load_profile("shmipi")
