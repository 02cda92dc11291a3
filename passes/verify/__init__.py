"""Verification: an oracle that never drops a row, and the comparison with it."""
