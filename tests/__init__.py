"""Tests of tokgraph."""
