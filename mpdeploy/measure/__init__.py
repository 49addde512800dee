"""Measuring: drift, accuracy, latency and the statistics of both. Pure; knows the Runner protocol and no engine."""
