"""The version, of which `setup.cfg` makes the distribution's."""

__version__ = "0.2.0"
