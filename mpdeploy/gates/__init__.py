"""Deciding: three-valued verdicts from evidence that can be decided again on any machine."""
