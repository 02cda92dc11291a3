"""Hand-written references that the compiled graphs are compared with. Nothing here imports tokgraph."""
