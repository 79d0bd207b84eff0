"""Where the state lives: one row per delayed event, on SQLite. This package must never decide anything: it loads, finds what is due, and saves."""
