"""Rewriting: seeds write the semantics, sinking removes the dead work."""
