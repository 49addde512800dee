"""Renderers of one gate.json and the run's manifest: JUnit, markdown, and a self-contained HTML page."""
