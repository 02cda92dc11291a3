"""Tests of passes, folder by folder as in passes/."""
