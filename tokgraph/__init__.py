"""tokgraph: a compiler that thins visual tokens of unified vision-language models."""
