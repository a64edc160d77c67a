"""The recipe of the embedded models."""
