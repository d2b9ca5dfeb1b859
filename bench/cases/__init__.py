"""Shapes and inputs, one file a vertical; the tests use them too."""
