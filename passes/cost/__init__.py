"""Accounting on any graph, captured or rewritten: rows, pathways, and what every node costs."""
