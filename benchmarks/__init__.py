"""Measurements. Each prints what it ran on, and compares with a limit that it measured in the same run."""
