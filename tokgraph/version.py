"""The version of tokgraph, as it is installed."""

from importlib.metadata import version

VERSION = version("tokgraph")
