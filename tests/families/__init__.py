"""Families of models and designs of papers, tiny: the rows of the table of models. A module each for kin ones."""
