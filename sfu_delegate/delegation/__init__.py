"""The rules: what is known of a participant, what is to be done with its delayed events, and in which order.

This package must never do I/O, read a clock or roll dice: `now` and randomness are arguments, and only the standard library is imported.
"""
