"""The version of tokgraph."""

VERSION = "0.1.0"
