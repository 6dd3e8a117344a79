"""Measuring Puna: see docs/performance.md. Not part of the installed package."""
